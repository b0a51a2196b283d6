"""Runs of several replicas of the student: every feature of a run has the numbers of a run of one, and a resume goes on
to the bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.events import read_events, read_validations
from megadistill.timeline.files import read_timeline
from megadistill.train.checkpoint.format import newest_checkpoint
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import run_teacher_server
from tests.ranks.harness import run_ranks
from tests.ranks.train.test_local_checkpoints import _folder, _local_recipe, _resumed, _train_with_spike
from tests.ranks.train.test_loop import BATCH, STEPS, STUDENT, _numbers, manifest, recipe, teacher

__all__ = ["manifest", "teacher"]

EXPERTS = {**STUDENT, "model_type": "mixtral", "num_local_experts": 4}

EVERYTHING: dict[str, Any] = {
    "student": {"config": EXPERTS},
    "loss": {"router_aux_loss_coef": 0.1, "ce_weight": 0.2, "diagnostics_every": 2},
    "train": {"norms_every": 1, "histograms_every": 2},
    "resilience": {"recompute_every": 2, "straggler_every": 2, "teacher_hash_every": 2},
    "data": {"document_mask": True},
    "run": {"timeline": [2, 3]},
    "profile": {"steps": [2, 2], "ranks": [3]},
}

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "stages": (4, 2, EVERYTHING),
    "own ranks": (2, 1, {"teacher": {"placement": "disaggregated", "ranks": 1}}),
    "shared sequences": (4, 2, {"distributed": {"sequence": 2}}),
    "damaged data": (2, 1, {"data": {"on_corrupt_sample": "mask", "max_masked_per_million": 1_000_000}}),
    "saved targets": (2, 1, {"loss": {"targets": {"draws": 8}}, "teacher": {"save_targets": "targets"}}),
}
"""Ranks of the student, those of a replica, and sections."""
LONG = ("shared sequences", "damaged data", "saved targets")


def _recipe(manifest: Path, teacher: Path, folder: Path, sections: dict[str, Any], *, world: int) -> Recipe:
    values = recipe(manifest, folder).snapshot()
    sequence = sections.get("distributed", {}).get("sequence", 1)
    changes: dict[str, Any] = {
        "teacher": {"path": str(teacher)},
        "train": {"micro_batch": BATCH // (world // sequence), "histograms_every": 0},
        "validation": {"every": 2, "data": {"seen": str(manifest)}, "sequences": 5},
    }
    values["objective"] = "distill"
    for part in (changes, sections):
        for name, section in part.items():
            values[name] = {**(values.get(name) or {}), **section}
    if values["teacher"].get("save_targets"):
        values["teacher"]["save_targets"] = str(folder / "targets")
    return Recipe.model_validate(values)


def _train(topology: Topology, values: dict[str, Any]) -> None:
    rank, world = topology.rank, topology.world
    if topology.bridge is not None:
        rank, world = topology.bridge.rank, topology.bridge.roles.world
    setup = prepare(Recipe.model_validate(values), Launch(rank, world, topology.local_rank, world))
    if topology.role == "teacher":
        run_teacher_server(setup, topology)
    else:
        run(setup, topology, stop_after=None)


def _start(given: Recipe, world: int, shard: int, *, p: int) -> None:
    """A run of `world` ranks of the student in replicas of `shard`, with vocab groups of p."""
    values, sequence = given.snapshot(), given.distributed.sequence
    values["distributed"] |= {"shard": shard, "vocab_group": p}
    roles = None
    if given.teacher is not None and given.teacher.placement == "disaggregated":
        roles = Roles(world + 1, 1, 1)
    groups = {"vocab_group": p, "sequence": sequence, "replicas": world // shard}
    run_ranks(world + (roles is not None), _train, values, roles=roles, **groups)


def _require_alike(ours: Any, theirs: Any, where: str) -> None:
    """Numbers to rounding, everything else exactly."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            _require_alike(value, theirs[key], f"{where}, {key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for one, other in zip(ours, theirs, strict=True):
            _require_alike(one, other, where)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-6), where
    else:
        assert ours == theirs, where


def _damaged(manifest: Path, folder: Path) -> Path:
    """A copy of the split with a wrong byte in its middle."""
    shutil.copytree(manifest.parent.parent, folder)
    shard = next((folder / manifest.parent.name).glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return folder / manifest.parent.name / manifest.name


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] * (n in LONG)) for n in CASES])
def test_a_run_of_replicas_has_the_numbers_of_one(manifest: Path, teacher: Path, tmp_path: Path, name: str) -> None:
    world, shard, sections = CASES[name]
    folders, sequence = (tmp_path / "one", tmp_path / "replicas"), sections.get("distributed", {}).get("sequence", 1)
    if name == "damaged data":
        manifest = _damaged(manifest, tmp_path / "data")
    for folder, ranks in zip(folders, (world, shard), strict=True):
        _start(_recipe(manifest, teacher, folder, sections, world=world), world, ranks, p=shard // sequence)
    one, replicas = (_numbers(folder) for folder in folders)
    assert len(replicas) == STEPS
    _require_alike(replicas, one, "metrics")
    measured = [[line["splits"] for line in read_validations(folder)] for folder in folders]
    assert len(measured[0]) == 4
    _require_alike(measured[1], measured[0], "validation")
    masked = [[e["slots"] for e in read_events(folder) if e["event"] == "samples_masked"] for folder in folders]
    assert masked[0] == masked[1]
    assert bool(masked[0]) == (name == "damaged data")
    if name == "stages":
        assert sum("norms" in line for line in replicas) == STEPS
        assert [path.name for path in sorted((folders[1] / "timeline").glob("rank-*.json"))] == [
            f"rank-0000{rank}.json" for rank in range(world)
        ]
        roles = [f"student, replica {rank // shard}, stage {rank % shard}" for rank in range(world)]
        assert [lane.role for lane in read_timeline(folders[1]).lanes] == roles
        assert (folders[1] / "profile" / "rank-00003.json.gz").exists()


def _parameters(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.manifest.step == STEPS
    return {name: checkpoint.parameter(name) for name in checkpoint.manifest.parameters}


def _train_locally(topology: Topology, manifest: str, folder: str, nodes: str, stop_after: int | None) -> int:
    """A run with local saves of each step, and durable ones of every second; each rank is a node of its own."""
    values = _local_recipe(Path(manifest), Path(folder), Path(nodes), topology.rank).snapshot()
    values["distributed"] |= {"shard": topology.shard_world, "vocab_group": topology.group_size}
    values["train"]["checkpoint_every"] = 2
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    outcome = run(prepare(Recipe.model_validate(values), launch), topology, stop_after=stop_after)
    assert outcome is not None
    return outcome.step


@pytest.fixture(scope="module")
def undisturbed(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run of 2 x 2."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(4, _train_locally, str(manifest), str(folder / "run"), str(folder / "nodes"), None, replicas=2)
    return folder / "run"


def _crash(manifest: Path, folder: Path) -> None:
    """2 x 2 as a fault after step 4 leaves it: a durable checkpoint of step 2, and a local save of step 3."""
    arguments = (str(manifest), str(folder / "run"), str(folder / "nodes"))
    run_ranks(4, _train_locally, *arguments, 4, replicas=2)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    shutil.rmtree(_folder(folder / "nodes", 2))  # its save is copied to the next node


@pytest.mark.parametrize(("shard", "step", "tier"), [(2, 3, "local"), (1, 2, None)])
def test_a_restart_goes_on_from_the_local_save_of_the_same_shards_alone(
    manifest: Path, undisturbed: Path, tmp_path: Path, shard: int, step: int, tier: str | None
) -> None:
    """To the bit, though a node is lost; another shard resumes from the durable checkpoint, of which one file a shard
    is there."""
    _crash(manifest, tmp_path)
    arguments = (str(manifest), str(tmp_path / "run"), str(tmp_path / "nodes"))
    assert run_ranks(4, _train_locally, *arguments, None, replicas=4 // shard) == [STEPS] * 4
    event = _resumed(tmp_path / "run")
    assert (event["step"], event.get("tier")) == (step, tier)
    ours, theirs = _numbers(tmp_path / "run"), _numbers(undisturbed)
    if tier is None:
        _require_alike(ours, theirs, "metrics")
        return
    assert ours == theirs
    parameters, others = _parameters(tmp_path / "run"), _parameters(undisturbed)
    assert all(torch.equal(parameters[name], others[name]) for name in others)


def _train_durably(topology: Topology, manifest: str, folder: str, teacher: str, stop_after: int | None) -> None:
    """A run with a checkpoint of step 2 alone, apart from that of its end."""
    values = _recipe(Path(manifest), Path(teacher), Path(folder), {}, world=topology.world).snapshot()
    values["distributed"] |= {"shard": topology.shard_world, "vocab_group": topology.group_size}
    values["validation"] = None
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    run(prepare(Recipe.model_validate(values), launch), topology, stop_after=stop_after)


@pytest.mark.parametrize("shard", [1, 2])
def test_a_run_of_replicas_that_is_resumed_is_the_undisturbed_one_to_the_bit(
    manifest: Path, teacher: Path, tmp_path: Path, shard: int
) -> None:
    """From a durable checkpoint, of two replicas: losses and all other numbers, and the master weights."""
    folders = (tmp_path / "undisturbed", tmp_path / "resumed")
    launches: tuple[list[int | None], ...] = ([None], [2, None])
    for folder, stops in zip(folders, launches, strict=True):
        for stop_after in stops:
            arguments = (str(manifest), str(folder), str(teacher), stop_after)
            run_ranks(2 * shard, _train_durably, *arguments, replicas=2)
    assert (_resumed(folders[1])["step"], _resumed(folders[1]).get("tier")) == (2, None)
    undisturbed, resumed = (_numbers(folder) for folder in folders)
    assert len(undisturbed) == STEPS
    assert resumed == undisturbed
    truth, parameters = (_parameters(folder) for folder in folders)
    assert truth.keys() == parameters.keys()
    assert all(torch.equal(parameters[name], truth[name]) for name in truth)


def test_a_rollback_goes_back_to_a_local_save_of_replicas(manifest: Path, tmp_path: Path) -> None:
    folder, skipped = tmp_path / "run", [[3 * BATCH, 4 * BATCH]]
    run_ranks(2, _train_with_spike, str(manifest), str(folder), str(tmp_path / "nodes"), [], replicas=2)
    (rollback,) = (event for event in read_events(folder) if event["event"] == "rollback")
    assert (rollback["to_step"], rollback["skipped_slots"]) == (3, skipped[0])
    assert (_resumed(folder)["step"], _resumed(folder)["tier"]) == (3, "local")
    run_ranks(
        2, _train_with_spike, str(manifest), str(tmp_path / "skips"), str(tmp_path / "other"), skipped, replicas=2
    )
    assert _numbers(folder) == _numbers(tmp_path / "skips")
