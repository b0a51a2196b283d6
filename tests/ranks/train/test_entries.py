"""Curriculum entries with a sequence length, a batch, rotary embeddings and weights of their own, on real ranks.

The truth is one process: a dense transformers model in float64, torch's clipping and AdamW, batches cut by hand.
"""

import copy
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import override

from megadistill.config.load import load_recipe
from megadistill.config.recipe import Recipe
from megadistill.data import Manifest, TokenStream, tokenize
from megadistill.data.tokenizers.data_files import read_files
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.events import read_validations
from megadistill.export.export_run import export_run
from megadistill.loss import Head, reference
from megadistill.models.families import build_causal_lm, load_config
from megadistill.models.initial_weights import initial_tensor
from megadistill.report.page import report
from megadistill.student.engine import StudentEngine
from megadistill.student.rope import with_rope
from megadistill.train.build import objective_of
from megadistill.train.loop import run
from megadistill.train.schedule import learning_rate
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import run_teacher_server
from tests.corpora import small_data_set
from tests.paths import DS_CONFIGS, RECIPES
from tests.ranks.harness import run_ranks

SHORT, LONG, SEED = 16, 48, 3
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
ROPE = {"rope_type": "linear", "factor": 3, "rope_theta": 50_000}
CURRICULUM: list[dict[str, Any]] = [
    {"tokens": 3 * 4 * SHORT, "weights": {"short": 1}, "global_batch": 4, "micro_batch": 2},
    {"tokens": 2 * 8 * SHORT - 20, "weights": {"short": 1}, "loss": {"kd_weight": 0.5, "ce_weight": 0.5}},
    {"weights": {"long": 1}, "sequence_length": LONG, "global_batch": 4, "micro_batch": 1, "rope": ROPE},
]
"""Three steps of 4 sequences, two of 8 (rounded up), then 4 long ones each."""
TOKENS = 3 * 4 * SHORT + 2 * 8 * SHORT + 3 * 4 * LONG
STEPS = 8
CLOCK = {
    "time", "seconds", "tokens_per_second", "data_seconds", "student_seconds", "loss_seconds", "teacher_seconds",
    "wait_seconds", "memory_bytes", "mfu", "student_mfu", "teacher_mfu",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of two sequence lengths with one tokenizer, and a teacher of two layers."""
    folder = tmp_path_factory.mktemp("entries")
    short = small_data_set(folder, sequence_length=SHORT, heldout_fraction=0.3)
    (tokenizer,) = (short / "tokenizer").glob("*.model")
    tokenize(
        sorted(folder.glob("*.py")),
        folder / "long",
        tokenizer=tokenizer,
        vocab_size=None,
        sequence_length=LONG,
        heldout_fraction=0.3,
        progress=lambda stage, **numbers: None,
    )
    manifest = Manifest.load(short / "train" / "manifest.json")
    torch.manual_seed(5)
    config = {**STUDENT, "hidden_size": 48, "initializer_range": 0.3, "vocab_size": manifest.vocab_size}
    AutoModelForCausalLM.from_config(load_config(config, what="test")).save_pretrained(folder / "teacher")
    (folder / "teacher" / "tokenizer.model").write_bytes(read_files(manifest)["tokenizer.model"])
    return folder


def recipe(place: Path, folder: Path, **changes: Any) -> Recipe:
    sources = {"short": "set/train", "long": "long/train"}
    values: dict[str, Any] = {
        "objective": "distill",
        "run": {"folder": str(folder), "seed": SEED},
        "data": {
            "sources": {name: str(place / path / "manifest.json") for name, path in sources.items()},
            "curriculum": CURRICULUM,
        },
        "student": {"deepspeed": str(DS_CONFIGS / "zero3.json"), "vocab_multiple": 64, "config": STUDENT},
        "teacher": {"path": str(place / "teacher")},
        "loss": {"ce_weight": 0.1},
        "train": {
            "tokens": TOKENS,
            "global_batch": 8,
            "micro_batch": 2,
            "precision": "float32",
            "max_grad_norm": 0.5,
            "optimizer": {"learning_rate": 3e-3, "epsilon": 1e-4},
            "schedule": {"kind": "wsd", "warmup_tokens": 2 * 4 * SHORT, "decay_tokens": 2 * 4 * LONG},
        },
    }
    for section, value in changes.items():
        values[section] = {**values.get(section, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(values)


class Watched(StudentEngine):
    """Keeps the norms of the gradients as ZeRO-3 holds them just before each optimizer step."""

    gradients: list[dict[str, torch.Tensor]] = []  # noqa: RUF012

    @override
    def step(self, learning_rate: float) -> float | None:
        if self._engine.is_gradient_accumulation_boundary():
            whole = {name: safe_get_full_grad(p) for name, p in self._model.named_parameters()}
            self.gradients.append({name: gradient.cpu().clone() for name, gradient in whole.items()})
        return super().step(learning_rate)


def _train(topology: Topology, values: dict[str, Any], stop_after: int | None) -> list[dict[str, torch.Tensor]]:
    rank, world = topology.rank, topology.world
    if topology.bridge is not None:
        rank, world = topology.bridge.rank, topology.bridge.roles.world
    setup = prepare(Recipe.model_validate(values), Launch(rank, world, topology.local_rank, world))
    if topology.role == "teacher":
        run_teacher_server(setup, topology)
        return []
    Watched.gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megadistill.train.build.StudentEngine", Watched)
        run(setup, topology, stop_after=stop_after)
    return Watched.gradients if topology.is_first else []


def _numbers(folder: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def start(
    world: int,
    given: Recipe,
    *,
    stops: tuple[int | None, ...] = (None,),
    roles: Roles | None = None,
    vocab_group: int | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """Lines of the run, and the gradients of its last start."""
    for stop in stops:
        values = given.model_dump(mode="json")
        if given.train.steps == 0:
            values["train"]["steps"] = None
        sequence = given.distributed.sequence
        gradients, *_ = run_ranks(world, _train, values, stop, roles=roles, vocab_group=vocab_group, sequence=sequence)
    return _numbers(Path(given.run.folder)), gradients


def dense_truth(place: Path) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """Numbers and gradients of each step, in float64."""
    given = recipe(place, place / "unused")
    setup = prepare(given, Launch(0, 1, 0, 1))
    vocab, objective = setup.data.vocab_size, objective_of(setup)
    config = copy.deepcopy(setup.student_config)
    model = build_causal_lm(config, vocab_size=vocab, dtype=torch.float32)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(initial_tensor(name, parameter.shape, std=config.initializer_range, seed=SEED, norm=1.0))
    model.double()
    teacher = AutoModelForCausalLM.from_pretrained(place / "teacher", dtype=torch.float64)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    stream = TokenStream(setup.data, seed=1, batch_slots=1, rank=0, world_size=1)
    turned = type(model.model.rotary_emb)(config=with_rope(config, ROPE, what="test"))
    steps, slot, tokens = [], 0, 0
    for step in range(1, STEPS + 1):
        size = 8 if step in (4, 5) else 4
        if step == 6:
            model.model.rotary_emb = turned
        batch = stream.batch(range(slot, slot + size))
        slot, tokens = slot + size, tokens + batch.tokens.numel()
        labels = batch.labels.flatten()
        weights = (labels != -100).double() / (labels != -100).sum()
        weight = {"kd_weight": 0.5, "ce_weight": 0.5} if step in (4, 5) else {}
        with torch.no_grad():
            theirs = teacher.model(batch.tokens).last_hidden_state.flatten(0, 1)
        terms = reference.distill_loss(
            Head(model.model(batch.tokens, use_cache=False).last_hidden_state.flatten(0, 1), model.lm_head.weight),
            Head(theirs, teacher.lm_head.weight),
            labels,
            token_weights=weights,
            divergence=objective.of_entry(given.loss.model_copy(update=weight)).divergence(step),
            vocab_size=vocab,
        )
        optimizer.zero_grad()
        terms.loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.train, tokens)
        optimizer.step()
        numbers = {"loss": terms.loss.item(), "kl": terms.kl.item(), "grad_norm": norm.item(), "tokens": tokens}
        steps.append((numbers, gradients))
    return steps


@cache
def _truth(place: Path) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    return dense_truth(place)


@pytest.mark.parametrize(
    ("world", "roles", "sequence"),
    [
        (1, None, 1),
        (2, None, 1),
        (3, Roles(3, 2, 2), 1),
        pytest.param(2, None, 2, marks=pytest.mark.thorough),
        pytest.param(4, None, 2, marks=pytest.mark.thorough),
    ],
    ids=["1", "2", "2 stages", "2 that share sequences", "2 stages that share sequences"],
)
def test_three_entries_are_learned_as_by_one_dense_model(
    place: Path, tmp_path: Path, world: int, roles: Roles | None, sequence: int
) -> None:
    """A small batch, a large one with other weights, then long sequences with other rotary embeddings."""
    own = {} if roles is None else {"placement": "disaggregated", "ranks": 2, "stages": 2, "queue": 3}
    group = world // sequence if roles is None else None
    shared = {"distributed": {"sequence": sequence, "vocab_group": group}} if sequence > 1 else {}
    given = recipe(place, tmp_path / "run", teacher=own, **shared)
    lines, gradients = start(world, given, roles=roles, vocab_group=group)
    truth = _truth(place)
    assert [line["entry"] for line in lines] == [1, 1, 1, 2, 2, 3, 3, 3]
    assert len(lines) == len(gradients) == len(truth) == STEPS
    for line, own_gradients, (numbers, true_gradients) in zip(lines, gradients, truth, strict=True):
        assert {name: line[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
        for name, gradient in true_gradients.items():
            ours = own_gradients[name].double()[: len(gradient)]
            error = (ours - gradient).norm() / gradient.norm()
            assert error < 1e-3, (line["step"], name, float(error))


def test_a_run_that_stops_in_at_and_after_each_border_resumes_to_the_same_bit(place: Path, tmp_path: Path) -> None:
    whole, _ = start(2, recipe(place, tmp_path / "whole"))
    resumed, _ = start(2, recipe(place, tmp_path / "resumed"), stops=(3, 4, 5, None))
    assert resumed == whole
    for step, theta, kind in ((5, 10_000.0, "default"), (8, 50_000.0, "linear")):
        output = tmp_path / f"exported-{step}"
        export_run(tmp_path / "resumed", output, step=step, max_shard_bytes=1 << 20, dtype=None)
        rope = AutoConfig.from_pretrained(output).rope_parameters
        assert (rope["rope_theta"], rope["rope_type"]) == (theta, kind), "that of the checkpoint's step"
    events = (tmp_path / "resumed" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    begun = [event for event in map(json.loads, events) if event["event"] == "curriculum_entry"]
    assert [(event["step"], event["entry"]) for event in begun] == [(1, 1), (4, 2), (5, 2), (6, 3)]
    assert begun[-1]["rope"] == ROPE
    assert begun[-1]["sequence_length"] == LONG


def test_only_entries_ahead_may_be_edited(place: Path, tmp_path: Path) -> None:
    given = recipe(place, tmp_path / "run")
    start(1, given, stops=(4,))
    later = copy.deepcopy(CURRICULUM)
    later[2]["rope"], later[2]["global_batch"] = 1e6, 8
    edited = recipe(place, tmp_path / "run", data={"curriculum": later})
    prepare(edited, Launch(0, 1, 0, 1))
    for number, key, value in ((1, "global_batch", 8), (2, "loss", {"kd_weight": 0.25, "ce_weight": 0.75})):
        before = copy.deepcopy(CURRICULUM)
        before[number - 1][key] = value
        with pytest.raises(UserError, match=f"data.curriculum: {key} of entry {number} was .*of its sequences: undo"):
            prepare(recipe(place, tmp_path / "run", data={"curriculum": before}), Launch(0, 1, 0, 1))
    lines, _ = start(1, edited, stops=(None,))
    assert [line["tokens"] for line in lines][-2:] == [448 + 8 * LONG, 448 + 2 * 8 * LONG]


def test_one_entry_alone_decides_the_shape_of_all_steps(place: Path, tmp_path: Path) -> None:
    """Its batch and rotary embeddings are those of a run that has them in `train` and `student.config`, to the bit."""
    steps = {"tokens": 2 * 4 * LONG, "schedule": {"kind": "wsd", "warmup_tokens": 0, "decay_tokens": 4 * LONG}}
    sources = {"long": str(place / "long" / "train" / "manifest.json")}
    entry = {"weights": {"long": 1}, "global_batch": 4, "micro_batch": 1, "rope": ROPE}
    by_entry = {"sources": sources, "curriculum": [entry]}
    ours, _ = start(1, recipe(place, tmp_path / "entry", data=by_entry, train=steps))
    plain = {"sources": sources, "curriculum": [{"weights": {"long": 1}}]}
    student = {"config": {**STUDENT, "rope_parameters": ROPE}}
    own = {"data": plain, "student": student, "train": {**steps, "global_batch": 4, "micro_batch": 1}}
    theirs, _ = start(1, recipe(place, tmp_path / "plain", **own))
    assert ours == theirs
    assert len(ours) == 2
    exported = tmp_path / "exported"
    export_run(tmp_path / "entry", exported, step=None, max_shard_bytes=1 << 20, dtype=None)
    assert AutoConfig.from_pretrained(exported).rope_parameters["rope_type"] == "linear"
    card = (exported / "README.md").read_text(encoding="utf-8")
    for line in (
        f"| sequence length | {LONG} tokens |",
        "| batch | 4 sequences, by curriculum entry |",
        f"constant, down to 0.1 of it over the last {4 * LONG} tokens |",
    ):
        assert line in card, line


def test_ranks_over_which_no_batch_divides_take_the_same_steps(place: Path, tmp_path: Path) -> None:
    """4 sequences in micro-batches of 2, then 8, then 4 long ones in those of 1, on 3 ranks: of the first two the last
    rank has surplus rows alone. Documents are masked."""
    data = {"document_mask": True}
    lines = {}
    for world in (1, 3):
        given = recipe(place, tmp_path / str(world), data=data, distributed={"vocab_group": 1})
        lines[world], _ = start(world, given, vocab_group=1)
    assert [line["tokens"] for line in lines[3]] == [line["tokens"] for line in lines[1]]
    for ours, theirs in zip(lines[3], lines[1], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-7)


def test_slots_that_are_skipped_leave_no_step_across_a_border(place: Path, tmp_path: Path) -> None:
    """Of the first entry's 12 sequences 2 are left out, and 2 more fill no step; the run reads as many tokens."""
    lines, _ = start(2, recipe(place, tmp_path / "run", data={"skip": [[5, 7]]}))
    assert [line["entry"] for line in lines] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert lines[-1]["tokens"] == 2 * 64 + 2 * 128 + 4 * 192 >= TOKENS
    assert lines[-1]["learning_rate"] == pytest.approx(3e-4), "the last value of the schedule"


def test_what_does_not_fit_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    def refused(number: int, world: int = 1, **entry: Any) -> str:
        curriculum = copy.deepcopy(CURRICULUM)
        curriculum[number - 1].update(entry)
        with pytest.raises(UserError) as caught:
            prepare(recipe(place, tmp_path / "run", data={"curriculum": curriculum}), Launch(0, world, 0, world))
        return str(caught.value)

    assert "entry 3 has sequence_length 32, its source long sequences of 48 tokens" in refused(3, sequence_length=32)
    assert "rope_parameters has no key facter; did you mean 'factor'?" in refused(3, rope={"facter": 2})
    assert "data.curriculum: rope of entry 3" in refused(3, rope={"rope_type": "yarrn", "factor": 2.0})
    stretched = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    for section, says in (
        ({"distributed": {"sequence": 2}}, "type dynamic in data.curriculum: rope of entry 3 depend on the length"),
        ({"data": {"document_mask": True}}, "rope of entry 3: rotary embeddings of type dynamic stretch with"),
    ):
        curriculum = [*CURRICULUM[:2], {**CURRICULUM[2], "rope": stretched}]
        own = {**section, "data": {"curriculum": curriculum, **section.get("data", {})}}
        with pytest.raises(UserError, match=says):
            prepare(recipe(place, tmp_path / "run", **own), Launch(0, 2, 0, 2))
    stores = recipe(
        place, tmp_path / "run", teacher={"save_targets": str(tmp_path / "t")}, loss={"targets": {"draws": 4}}
    )
    with pytest.raises(
        UserError, match="stored targets have one sequence length, and the curriculum's entries have 16"
    ):
        prepare(stores, Launch(0, 1, 0, 1))


def _shrunken(place: Path, folder: Path) -> Recipe:
    """recipes/llama3-70b-to-8b/long.yaml with tiny models, short sequences and small batches, and all else as it is."""
    values = load_recipe(RECIPES / "llama3-70b-to-8b" / "long.yaml").snapshot()
    paths = {4096: "set/train", 32768: "long/train"}
    lengths = {name: entry["sequence_length"] for entry in values["data"]["curriculum"] for name in entry["weights"]}
    for name in values["data"]["sources"]:
        values["data"]["sources"][name] = str(place / paths[lengths[name]] / "manifest.json")
    for entry, tokens in zip(values["data"]["curriculum"], (2 * 4 * SHORT, 3 * 8 * SHORT, None), strict=True):
        length = {4096: SHORT, 32768: LONG}[entry["sequence_length"]]
        batch = (entry["global_batch"] or values["train"]["global_batch"]) // 256
        entry |= {"tokens": tokens, "sequence_length": length, "global_batch": batch, "micro_batch": 1}
    splits = {"web": "set", "code": "set", "books": "long"}
    values["validation"] |= {"every": 3, "sequences": 4}
    values["validation"]["data"] = {name: str(place / path / "heldout/manifest.json") for name, path in splits.items()}
    tokens = 2 * 4 * SHORT + 3 * 8 * SHORT + 2 * 2 * LONG
    values["train"] |= {"tokens": tokens, "steps": None, "global_batch": 8, "micro_batch": 1, "precision": "float32"}
    for schedule in (values["train"]["schedule"], values["loss"]["schedule"]):
        schedule |= {"warmup_tokens": 64, "decay_tokens": 2 * 2 * LONG}
    values["loss"] |= {"elementwise": "eager", "diagnostics_every": 0}
    values["student"] |= {"config": STUDENT, "deepspeed": "cpu", "vocab_multiple": 64}
    values["teacher"]["path"] = str(place / "teacher")
    values["distributed"] |= {"vocab_group": 2}
    values["resilience"] |= {"max_rollbacks": 0}
    values["run"]["folder"] = str(folder)
    return Recipe.model_validate(values)


@pytest.mark.thorough
def test_the_recipe_with_all_of_it_is_stopped_at_each_border_and_its_page_shows_it(place: Path, tmp_path: Path) -> None:
    whole, _ = start(2, _shrunken(place, tmp_path / "whole"))
    given = _shrunken(place, tmp_path / "run")
    assert given.track == ["tensorboard"], "no tracker sends anything away unless asked"
    resumed, _ = start(2, given, stops=(2, 5, None))
    assert resumed == whole
    assert [line["entry"] for line in resumed] == [1, 1, 2, 2, 2, 3, 3]
    validated = list(read_validations(tmp_path / "run"))
    assert [line["step"] for line in validated] == [0, 3, 6, 7]
    assert set(validated[0]["splits"]) == {"web", "code", "books", "all"}
    html = report([tmp_path / "run"], output=None, evaluations=[], now=time.time()).read_text(encoding="utf-8")
    for words in ("curriculum entry 3 from step 6 on", "sequences of 48 tokens", "goodput", "Validation"):
        assert words in html, words
