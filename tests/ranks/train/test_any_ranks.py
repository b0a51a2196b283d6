"""Runs on ranks over which neither the global batch nor the vocabulary divides: as on one rank, and resumed by others.

4 sequences on 3 ranks in micro-batches of one are two rounds: the third rank has surplus rows alone.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megadistill.config.recipe import Recipe
from megadistill.data.targets.target_manifest import TargetManifest
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.export.export_run import export_run
from megadistill.student.state import ReadRange, StudentState
from megadistill.train.checkpoint.format import newest_checkpoint
from megadistill.train.lookahead import StepBatch, StepBatches
from megadistill.train.loop import _require_one_recipe, run
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import run_teacher_server
from tests.ranks.harness import run_ranks
from tests.ranks.train import test_loop as loops
from tests.ranks.train import test_several_teachers as several

manifest, teacher, teachers = loops.manifest, loops.teacher, several.teachers  # the fixtures
BATCH, STEPS = loops.BATCH, loops.STEPS

Slots = list[tuple[list[int], list[int]]]
"""Of each step: the slots of a rank's rows, and those of its surplus rows."""


def _train(topology: Topology, values: dict[str, Any], stop_after: int | None) -> Slots:
    rank, world = topology.rank, topology.world
    if topology.bridge is not None:
        rank, world = topology.bridge.rank, topology.bridge.roles.world
    setup, slots = prepare(Recipe.model_validate(values), Launch(rank, world, topology.local_rank, world)), list[Any]()
    if topology.role == "teacher":
        run_teacher_server(setup, topology)
        return slots
    plain = StepBatches.__next__

    def recorded(batches: StepBatches) -> StepBatch:
        step = plain(batches)
        rows, surplus = step.batch.slots, step.batch.surplus
        slots.append((rows[~surplus].tolist(), rows[surplus].tolist()))
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepBatches, "__next__", recorded)
        run(setup, topology, stop_after)
    return slots


def _run(
    values: dict[str, Any], *launches: tuple[int, int | None], roles: Roles | None = None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Lines of a run that is started on numbers of ranks (until a step), and the slots of each step, of all ranks."""
    slots: list[list[int]] = []
    for world, stop_after in launches:
        ranks = run_ranks(world, _train, values, stop_after, vocab_group=1, roles=roles)
        for step in zip(*filter(None, ranks), strict=True):
            proper = [slot for rows, _ in step for slot in rows]
            assert {slot for _, surplus in step for slot in surplus} <= {proper[-1]}, "the batch's last slot once more"
            slots.append(proper)
    return loops._numbers(Path(values["run"]["folder"])), slots


def _values(manifest: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """`vocab_multiple`: such that three ranks need a padding of their own."""
    values = loops.recipe(manifest, folder).snapshot()
    for name, section in changes.items():
        values[name] = {**(values.get(name) or {}), **section} if isinstance(section, dict) else section
    values["distributed"]["vocab_group"] = 1
    return values


def _assert_alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], *, rel: float = 3e-5) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert _numbers(one) == pytest.approx(_numbers(other), rel=rel, abs=1e-6), one["step"]


def _numbers(value: Any, name: str = "") -> dict[str, float]:
    """By path; without the deciles of a micro-batch's tokens, which another number of ranks cuts otherwise."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [_numbers(each, f"{name}/{key}") for key, each in items if "decile" not in str(key)]
        return {path: number for part in parts for path, number in part.items()}
    return {name: value}


def test_a_run_of_three_ranks_is_resumed_by_two_and_reads_the_slots_of_an_undisturbed_one(
    manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    """With diagnostics, norms and validations; the losses are equal to rounding, and the surplus rows are named."""
    heldout = manifest.parent.parent / "heldout" / "manifest.json"
    own: dict[str, Any] = {
        "objective": "distill",
        "teacher": {"path": str(teacher)},
        "loss": {"diagnostics_every": 2},
        "validation": {"data": {"heldout": str(heldout)}, "every": 2, "sequences": 3},
    }
    runs = {}
    launched: dict[str, list[tuple[int, int | None]]] = {"one": [(1, None)], "others": [(3, 2), (2, 4), (3, None)]}
    for name, launches in launched.items():
        values = _values(manifest, tmp_path / name, **own)
        values["train"] |= {"norms_every": 1, "micro_batch": BATCH if name == "one" else 1}
        runs[name] = _run(values, *launches)
    (lines, slots), (undisturbed, all_slots) = runs["others"], runs["one"]
    assert slots == all_slots == [list(range(BATCH * step, BATCH * step + BATCH)) for step in range(STEPS)]
    _assert_alike(lines, undisturbed)
    assert [line["tokens"] for line in lines] == [BATCH * 64 * step for step in range(1, STEPS + 1)]
    validations = [(tmp_path / name / "validation.jsonl").read_text(encoding="utf-8") for name in runs]
    ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in validations)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    log = (tmp_path / "others" / "log.txt").read_text(encoding="utf-8")
    assert log.count("does not divide into 3 ranks x micro-batch 1, and 33.3% of the rows") == 2
    rows = []
    for name in runs:
        checkpoint = newest_checkpoint(tmp_path / name / "checkpoints")
        assert checkpoint is not None
        rows.append(checkpoint.manifest.parameters["lm_head.weight"][0])
    assert rows[0] % 3 == 0 or rows[0] % 64 == 0
    assert rows[1] % 3 == 0, "the vocabulary's padding is that of the ranks that wrote the checkpoint"


def test_a_student_with_experts_is_balanced_alike(manifest: Path, tmp_path: Path) -> None:
    lines = {}
    for world in (1, 3):
        values = _values(manifest, tmp_path / str(world), loss={"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1})
        values["student"]["config"] = {**loops.STUDENT, "model_type": "mixtral", "num_local_experts": 4}
        lines[world], _ = _run(values, (world, None))
    _assert_alike(lines[3], lines[1])


def test_several_teachers_teach_alike(manifest: Path, teachers: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """A surplus row has a source, and its teacher; it counts for neither."""
    by_name = {"coder": {**teachers["other"], "sources": ["code"]}, "rest": teachers["plain"]}
    data = {**several._mixture(manifest), "manifest": None}
    lines = {}
    for world in (1, 3):
        values = _values(manifest, tmp_path / str(world), data=data, teachers=by_name, objective="distill")
        lines[world], _ = _run(values, (world, None))
    _assert_alike(lines[3], lines[1])
    assert {group["labels"] for line in lines[3][:2] for group in line["by_source"].values()} == {BATCH * 64}


def test_stored_targets_have_each_slot_once_and_teach_alike(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    loss = {"targets": {"select": "top_p", "p": 0.8, "max_ids": 20}}
    saving = {"path": str(teacher), "save_targets": str(tmp_path / "targets")}
    values = _values(manifest, tmp_path / "live", objective="distill", loss=loss, teacher=saving)
    live, _ = _run(values, (3, 2), (3, None))
    targets = TargetManifest.load(tmp_path / "targets")
    assert targets.slots == targets.stop == STEPS * BATCH
    stored = {"source": "stored", "targets": str(tmp_path / "targets")}
    for world in (3, 2):
        values = _values(manifest, tmp_path / str(world), objective="distill", loss=loss, teacher=stored)
        lines, _ = _run(values, (world, None))
        _assert_alike(lines, live)


def test_a_teacher_on_ranks_of_its_own_serves_ranks_without_a_row_of_the_batch(
    manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    lines = {}
    apart: dict[str, Any] = {"placement": "disaggregated", "ranks": 1, "queue": 3}
    for world, own, roles in ((1, {}, None), (4, apart, Roles(4, 1, 1))):
        section = {"path": str(teacher), **own}
        values = _values(manifest, tmp_path / str(world), objective="distill", teacher=section)
        lines[world], _ = _run(values, (world, None), roles=roles)
    _assert_alike(lines[4], lines[1])


def _train_and_count(topology: Topology, values: dict[str, Any], stop_after: int | None) -> tuple[int, Slots]:
    """Pieces of the student's state that this rank has read from storage, beside what `_train` returns."""
    read, plain = list[str](), StudentState.load

    def load(state: StudentState, reads: ReadRange) -> None:
        def recorded(key: str, start: int, stop: int) -> Tensor:
            read.append(key)
            return reads(key, start, stop)

        plain(state, recorded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentState, "load", load)
        slots = _train(topology, values, stop_after)
    return len(read), slots


@pytest.mark.parametrize("begins", ["checkpoint", "weights"])
def test_one_replica_reads_the_state_for_all(manifest: Path, tmp_path: Path, begins: str) -> None:
    """From a checkpoint of two ranks and from weights, on replicas of one rank and of two."""
    first = _values(manifest, tmp_path / "first")
    run_ranks(2, _train, first, 2, vocab_group=1)
    weights = str(tmp_path / "exported")
    if begins == "weights":
        export_run(tmp_path / "first", Path(weights), step=None, max_shard_bytes=1 << 20, dtype=None)
    lines = []
    for world, replicas in ((1, 1), (2, 2), (4, 2)):
        folder = tmp_path / f"{world}-{replicas}"
        if begins == "checkpoint":
            shutil.copytree(tmp_path / "first", folder)
        values = _values(manifest, folder)
        values["student"]["weights"] = weights if begins == "weights" else None
        values["distributed"]["shard"] = world // replicas
        ranks = run_ranks(world, _train_and_count, values, None, vocab_group=1, replicas=replicas)
        assert [count > 0 for count, _ in ranks] == [rank < world // replicas for rank in range(world)]
        lines.append(loops._numbers(folder))
    _assert_alike(lines[1], lines[0])
    _assert_alike(lines[2], lines[0])


def _compare_recipes(topology: Topology, values: dict[str, Any]) -> str:
    if topology.replica == 1:
        values["train"] = {**values["train"], "micro_batch": 2 * values["train"]["micro_batch"]}
    setup = prepare(Recipe.model_validate(values), Launch(topology.rank, topology.world, topology.local_rank, 2))
    try:
        _require_one_recipe(setup, topology)
    except UserError as error:
        return str(error)
    return ""


def test_a_replica_with_another_recipe_is_refused_and_the_first_is_not(manifest: Path, tmp_path: Path) -> None:
    values = _values(manifest, tmp_path / "run")
    values["train"]["micro_batch"] = 1
    first, other = run_ranks(2, _compare_recipes, values, vocab_group=1, replicas=2)
    assert (first, other) == (
        "",
        "this replica has another recipe than the first one: train.micro_batch is 1 there, 2 here: start all with the "
        "same",
    )
