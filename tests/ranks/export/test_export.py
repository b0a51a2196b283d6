"""Export of a run of two ranks: transformers loads the model that was trained.

Legend: B sequences, S tokens of a sequence, N = B·S, V true vocabulary, P padded vocabulary, D width.
"""

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.topology import Topology
from megadistill.export.export_run import export_run
from megadistill.models.families import EMBEDDING, HEAD, load_config, parameter_shapes
from megadistill.precision import PRECISIONS, Precision, torch_dtype
from megadistill.types import Cursor
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import MULTIPLE, VOCAB, Case, build, config_of, global_batch, recipe_for, run_steps
from tests.unit.train.cases import save_checkpoint

STEPS = 2
CURSOR = Cursor(
    "f", 8 * STEPS, order=json.dumps({"sources": {"data": "f"}, "stages": [{"slots": None, "quotas": {"data": 1}}]})
)


@dataclass(frozen=True)
class Trained:
    """The training model after its last step."""

    logits_NP: Tensor
    start_PD: Tensor
    """Rows of the head before the first step."""
    head_PD: Tensor


def _tokens_BS() -> Tensor:
    return global_batch(99).tokens[:3]


def _train_and_save(topology: Topology, case: Case, run: str) -> Trained:
    student = build(case, topology)

    def whole_head() -> Tensor:
        with torch.no_grad():  # the whole world is one vocab group, so the slices in rank order are the head
            return all_gather_rows(student.head.weight().detach(), topology.vocab_group).clone()

    start_PD = whole_head()
    run_steps(case, student, topology, range(STEPS))
    head_PD = whole_head()
    with torch.no_grad():
        logits_NP = torch.nn.functional.linear(student.hidden(_tokens_BS()), head_PD)
    save_checkpoint(
        Path(run) / "checkpoints",
        student.state.snapshot(),
        STEPS,
        rank=topology,
        vocab_size=VOCAB,
        parameters=student.state.shapes,
        cursor=CURSOR.state(),
        recipe=_recipe(Path(run), case),
    )
    return Trained(logits_NP=logits_NP, start_PD=start_PD, head_PD=head_PD)


def _recipe(run: Path, case: Case) -> dict[str, Any]:
    recipe = recipe_for("manifest.json", str(run), student={"config": str(run / "config")}).snapshot()
    recipe["train"]["precision"] = case.precision
    return recipe


def _describe(run: Path, config: dict[str, Any]) -> None:
    """The parts of the run folder that an export reads."""
    for name, content in (
        ("recipe.json", b"{}"),
        ("config/config.json", json.dumps(config).encode()),
        ("tokenizer/tokenizer.model", b"pieces"),
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_transformers_loads_the_model_that_was_trained(precision: Precision, tied: bool, tmp_path: Path) -> None:
    case = Case(precision=precision, tied=tied)
    trained = run_ranks(2, _train_and_save, case, str(tmp_path))[0]
    assert trained.logits_NP.dtype == torch_dtype(precision)
    assert (trained.head_PD[:VOCAB] != trained.start_PD[:VOCAB]).float().mean() > 0.5, "training moved the head"
    assert trained.head_PD.shape[0] == MULTIPLE

    _describe(tmp_path, config_of(case).to_dict())
    output = tmp_path / "exported"
    assert export_run(tmp_path, output, step=None, max_shard_bytes=40_000, dtype=None) == STEPS
    model, info = AutoModelForCausalLM.from_pretrained(output, dtype="auto", output_loading_info=True)

    assert not any(info.values()), info
    assert model.dtype == torch_dtype(precision)
    parameters = dict(model.named_parameters())
    assert (HEAD in parameters) != tied
    assert model.config.vocab_size == parameters[EMBEDDING].shape[0] == VOCAB, "padding is removed"
    assert torch.equal(model.get_output_embeddings().weight, trained.head_PD[:VOCAB])
    with torch.no_grad():
        logits_NV = model(input_ids=_tokens_BS(), use_cache=False).logits.flatten(0, 1)
    assert torch.equal(logits_NV, trained.logits_NP[:, :VOCAB])
    assert (output / "tokenizer.model").read_bytes() == b"pieces"


SHARD, SLACK = 16 << 20, 80 << 20
LARGE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def _export_large(topology: Topology, run: str) -> int:
    """Bytes by which the peak of this process grew. A forked child's peak begins at what it holds then."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export_run(Path(run), Path(run) / "exported", step=None, max_shard_bytes=SHARD, dtype=None)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_an_export_holds_a_shard_and_a_parameter_not_the_model(tmp_path: Path) -> None:
    shapes = parameter_shapes(load_config(LARGE, what="test"))
    save_checkpoint(
        tmp_path / "checkpoints",
        {f"master/{name}": torch.zeros(shape.numel()) for name, shape in shapes.items()},
        STEPS,
        vocab_size=LARGE["vocab_size"],
        parameters={name: tuple(shape) for name, shape in shapes.items()},
        cursor=CURSOR.state(),
        recipe=recipe_for("manifest.json", str(tmp_path), student={"config": str(tmp_path / "config")}).snapshot(),
    )
    _describe(tmp_path, LARGE)
    model = 4 * sum(shape.numel() for shape in shapes.values())
    parameter = 4 * max(shape.numel() for shape in shapes.values())
    (grown,) = run_ranks(1, _export_large, str(tmp_path))
    assert grown < 2 * SHARD + 2 * parameter + SLACK < model / 2
    written = sum(path.stat().st_size for path in (tmp_path / "exported").glob("*.safetensors"))
    assert written > model / 2
