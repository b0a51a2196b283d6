"""A student that starts from a folder's weights, on ranks: against transformers' own model, loaded from that folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.config.recipe import Recipe, StudentSection
from megadistill.data import TokenStream
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.loss import Head, label_loss
from megadistill.models.families import load_config, logit_transform
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.student.deepspeed_config import load_deepspeed_config
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from tests.corpora import VOCAB as TEXT_VOCAB
from tests.corpora import small_data_set
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import MULTIPLE, Case, WatchedStudent, train_section
from tests.unit.models.cases import CASES, SIZES, VOCAB, saved_model

SHAPE = (2, 16)
"""The least that a tokenizer can have."""
MODEL: dict[str, Any] = {"model_type": "llama", **SIZES, "num_hidden_layers": 2}


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(70 + rank)
    return torch.randint(0, VOCAB, SHAPE, generator=generator), torch.randint(0, VOCAB, SHAPE, generator=generator)


def _step(topology: Topology, name: str, folder: str, persistence: int) -> dict[str, Any]:
    config = load_config(CASES[name], what="test")
    deepspeed_config = load_deepspeed_config(DS_CONFIGS / "cpu.json")
    deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
    student = WatchedStudent(
        config,
        section=StudentSection(config={}, weights=folder, vocab_multiple=MULTIPLE),
        train=train_section(Case(), topology.world),
        deepspeed_config=deepspeed_config,
        vocab_size=VOCAB,
        accumulation=1,
        topology=topology,
    )
    student.load_weights(Path(folder))
    student.gradients = []
    parameters = student.full_parameters()
    tokens, labels = _batch(topology.rank)
    hidden = student.hidden(tokens)
    terms = label_loss(
        Head(
            hidden,
            student.head.weight(),
            transform=logit_transform(config),
            weight_gradient=student.head.gradient(),
        ),
        labels.flatten(),
        token_weights=torch.full((labels.numel(),), 1 / (labels.numel() * topology.world)),
        vocab=student.head.vocab,
    )
    student.backward(terms.loss)
    student.step(1e-3)
    return {
        "parameters": parameters,
        "hidden": hidden.detach(),
        "loss": float(terms.loss),
        "gradients": student.gradients[0],
        "unlike": student.state.params_differing_from_master(),
    }


@pytest.mark.parametrize(
    ("name", "world", "dtype", "persistence"),
    [
        ("llama", 1, torch.float32, 0),
        ("llama-tied", 2, torch.bfloat16, 10_000),  # small parameters stay gathered: they must be gathered anew
        ("mixtral", 2, torch.float32, 0),
        ("gemma2", 2, torch.float32, 0),
    ],
)
def test_the_first_step_is_transformers_own(
    name: str, world: int, dtype: torch.dtype, persistence: int, tmp_path: Path
) -> None:
    saved_model(name, tmp_path / "first").to(dtype).save_pretrained(tmp_path / "weights", max_shard_size="60KB")
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "weights", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():  # before a step; transformers' own, in float32
        hidden = [
            model.base_model(input_ids=_batch(rank)[0], use_cache=False).last_hidden_state for rank in range(world)
        ]
    masters = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    model.double()
    losses = []
    for rank in range(world):
        tokens, labels = _batch(rank)
        logits = model(input_ids=tokens, use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    loss = torch.stack(losses).mean()
    loss.backward()  # type: ignore[no-untyped-call]

    results = run_ranks(world, _step, name, str(tmp_path / "weights"), persistence)
    assert sum(each["loss"] for each in results) == pytest.approx(loss.item(), rel=1e-6)
    for each, true in zip(results, hidden, strict=True):
        torch.testing.assert_close(each["hidden"], true.flatten(0, 1), rtol=1e-4, atol=1e-5)
        assert each["unlike"] == []
        assert each["parameters"].keys() == masters.keys()
        for path, master in masters.items():
            rows = master.shape[0]
            assert torch.equal(each["parameters"][path][:rows], master), path
            assert not each["parameters"][path][rows:].any(), f"padding rows of {path}"
    for path, parameter in model.named_parameters():
        gradient = results[0]["gradients"][path][: parameter.shape[0]]
        error = (gradient - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-5, f"the gradient of {path} is off by {error:.1e}"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return small_data_set(folder, sequence_length=32, heldout_fraction=0.3) / "train" / "manifest.json"


def _recipe(manifest: Path, folder: Path, weights: Path) -> Recipe:
    values: dict[str, Any] = {
        "objective": "labels",
        "run": {"folder": str(folder)},
        "data": {"manifest": str(manifest)},
        "student": {
            "config": {key: value for key, value in MODEL.items() if key != "vocab_size"},
            "weights": str(weights),
            "deepspeed": str(DS_CONFIGS / "cpu.json"),
            "vocab_multiple": 64,
        },
        "train": {
            "steps": 3,
            "global_batch": 4,
            "micro_batch": 2,
            "precision": "float32",
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    return Recipe.model_validate(values)


def _train(topology: Topology, recipe: Recipe, stop_after: int | None) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return run(prepare(recipe, launch), topology, stop_after=stop_after).step


def _losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_starts_from_the_weights_and_a_resume_needs_them_no_more(manifest: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(load_config({**MODEL, "vocab_size": TEXT_VOCAB}, what="test"))
    model.save_pretrained(tmp_path / "weights")
    fingerprint = teacher_fingerprint(tmp_path / "weights")
    whole = _recipe(manifest, tmp_path / "whole", tmp_path / "weights")
    run_ranks(2, _train, whole, None)
    batch = TokenStream(prepare(whole, Launch(0, 1, 0, 1)).data, seed=1, batch_slots=4, rank=0, world_size=1).batch(
        range(4)
    )
    logits = model.double()(input_ids=batch.tokens).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100)
    assert _losses(tmp_path / "whole")[0] == pytest.approx(loss.item(), rel=1e-6)

    stopped = _recipe(manifest, tmp_path / "stopped", tmp_path / "weights")
    run_ranks(2, _train, stopped, 2)
    shutil.rmtree(tmp_path / "weights")
    assert run_ranks(2, _train, stopped, None) == [3, 3]
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "whole")
    described = json.loads((tmp_path / "stopped" / "recipe.json").read_text(encoding="utf-8"))
    assert described["started_from"] == {"weights": str(tmp_path / "weights"), "fingerprint": fingerprint}
