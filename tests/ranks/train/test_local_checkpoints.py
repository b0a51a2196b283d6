"""The local tier on real ranks, each of which is a node of its own: saves, lost nodes, bitwise resumes."""

import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import CheckpointSection, Recipe
from megadistill.distributed.collectives import barrier
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.events import read_events
from megadistill.train.checkpoint.attempt import Attempt
from megadistill.train.checkpoint.format import newest_checkpoint
from megadistill.train.checkpoint.local_tier import LocalTier
from megadistill.train.checkpoint.writer import Saver
from megadistill.train.hooks.hook import Hook, Request, StepEvent
from megadistill.train.loop import Trainer, run
from megadistill.train.resilience.anomalies import Anomaly
from megadistill.train.setup.setup import prepare
from tests.ranks.harness import run_ranks
from tests.ranks.train.test_loop import BATCH, STEPS, _numbers, recipe
from tests.ranks.train.test_loop import manifest as manifest
from tests.unit.train.cases import manifest_of

WORLD = 3


def _folder(nodes: Path, rank: int) -> Path:
    return nodes / f"node-{rank}"


def _state(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {"master/w": torch.randn(1000 + rank, generator=generator), "rng": torch.get_rng_state()}


def _tier(topology: Topology, nodes: Path, run_folder: Path, *, attempt: int = 1) -> LocalTier:
    return LocalTier(_folder(nodes, topology.rank), topology, Attempt(run_folder, attempt), run="run")


def _saved(topology: Topology, nodes: str, run_folder: str, steps: list[int]) -> list[tuple[int, bool]]:
    """Saves of the tier, through the same saver as a durable one at the step before."""
    folder = Path(run_folder)
    section = CheckpointSection(asynchronous=False)
    tier = _tier(topology, Path(nodes), folder)
    saver = Saver(folder / "checkpoints", topology, Attempt(folder, 1), section, local=tier)
    results = []
    for step in steps:
        manifest = manifest_of(step).model_copy(update={"world": topology.world, "attempt": 1})
        results += saver.start_local(_state(topology.rank, step), manifest)
    saver.close()
    return [(result.step, result.path is not None) for result in results]


def _names(nodes: Path, rank: int) -> list[str]:
    return sorted(path.name for path in (_folder(nodes, rank) / "run").iterdir())


def _newest(
    topology: Topology, nodes: str, run_folder: str, lost: list[tuple[int, ...]]
) -> list[tuple[int, bool] | None]:
    """For each set of lost nodes: the step that is agreed on, and whether this rank reads its own state of it."""
    results: list[tuple[int, bool] | None] = []
    for number, nodes_lost in enumerate(lost):
        copy = Path(nodes).with_name(f"copy-{number}")
        own = _folder(copy, topology.rank)
        if topology.rank in nodes_lost:
            own.mkdir(parents=True)
        else:
            shutil.copytree(_folder(Path(nodes), topology.rank), own)
            (own / ".node").unlink()
        barrier(topology.world_group)
        checkpoint = _tier(topology, copy, Path(run_folder), attempt=2).newest(lambda manifest: True)
        if checkpoint is None:
            results.append(None)
            continue
        expected = _state(topology.rank, checkpoint.manifest.step)["master/w"]
        results.append(
            (checkpoint.manifest.step, torch.equal(checkpoint.read("master/w", 0, expected.numel()), expected))
        )
        checkpoint.release()
    return results


@pytest.mark.parametrize("world", [2, WORLD])
def test_a_save_survives_lost_nodes_of_which_no_two_are_neighbours(tmp_path: Path, world: int) -> None:
    """Every subset of lost nodes: the save is read where no two nodes in a row are lost, by every rank its own file."""
    nodes, run_folder = tmp_path / "nodes", tmp_path / "run"
    results = run_ranks(world, _saved, str(nodes), str(run_folder), [10, 20, 30])
    assert results == [[(10, True), (20, True), (30, True)]] * world
    for rank in range(world):
        assert _names(nodes, rank) == ["step-00000020-a1", "step-00000030-a1"], "the last two"
        files = sorted(path.name for path in (_folder(nodes, rank) / "run" / "step-00000030-a1").iterdir())
        own, before = (f"rank-{each:05d}-of-{world:05d}.safetensors" for each in (rank, (rank - 1) % world))
        assert files == sorted(["manifest.json", own, f"{own}.json", before, f"{before}.json"])
    subsets = [lost for size in range(world + 1) for lost in combinations(range(world), size)]
    steps = run_ranks(world, _newest, str(nodes), str(run_folder), subsets)
    for number, lost in enumerate(subsets):
        survives = not any((rank + 1) % world in lost for rank in lost)
        expected = (30, True) if survives else None
        assert [each[number] for each in steps] == [expected] * world, lost


def _on_a_broken_disk(topology: Topology, nodes: str, run_folder: str) -> list[tuple[int, bool]]:
    folder, section = Path(run_folder), CheckpointSection()
    tier = _tier(topology, Path(nodes), folder)
    saver = Saver(folder / "checkpoints", topology, Attempt(folder, 1), section, local=tier)
    results = []
    root = _folder(Path(nodes), topology.rank) / "run"
    for step in (10, 20, 30):
        if topology.rank == 1 and step == 20:
            root.rename(root.with_name("away"))
            root.write_text("nothing can be written below a file")
        manifest = manifest_of(step).model_copy(update={"world": topology.world, "attempt": 1})
        assert saver.start_local(_state(topology.rank, step), manifest) == []
        results.append(saver.finish())
        if topology.rank == 1 and step == 20:
            root.unlink()
            root.with_name("away").rename(root)
        barrier(topology.world_group)
    saver.close()
    return [(result.step, result.path is not None and result.is_local) for result in results]


def test_a_disk_that_refuses_a_local_save_costs_that_save_on_all_ranks_and_nothing_else(tmp_path: Path) -> None:
    results = run_ranks(2, _on_a_broken_disk, str(tmp_path / "nodes"), str(tmp_path / "run"))
    assert results == [[(10, True), (20, False), (30, True)]] * 2
    for rank in range(2):
        assert _names(tmp_path / "nodes", rank) == ["step-00000010-a1", "step-00000030-a1"]


def _local_recipe(manifest: Path, folder: Path, nodes: Path, rank: int, **changes: Any) -> Recipe:
    values = recipe(manifest, folder).snapshot()
    values["train"]["checkpoint_every"] = 4
    values["checkpoint"] = {"asynchronous": False, "local": {"every": 1, "folder": str(_folder(nodes, rank))}}
    values["resilience"] |= changes
    return Recipe.model_validate(values)


def _train(topology: Topology, manifest: str, folder: str, nodes: str, stop_after: int | None) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    made = _local_recipe(Path(manifest), Path(folder), Path(nodes), topology.rank)
    return run(prepare(made, launch), topology, stop_after=stop_after).step


@pytest.fixture(scope="module")
def undisturbed(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, _train, str(manifest), str(folder / "run"), str(folder / "nodes"), None)
    assert not list((folder / "nodes").glob("node-*/[!.]*")), "a complete run leaves no local saves"
    return folder / "run"


def _values(folder: Path) -> dict[str, Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.manifest.step == STEPS
    return {name: checkpoint.parameter(name) for name in checkpoint.manifest.parameters}


def _crashed(manifest: Path, folder: Path) -> tuple[Path, Path]:
    """A run of two nodes as a fault after step 3 leaves it: durable checkpoints of no step, local saves of 1 and 2."""
    run_ranks(2, _train, str(manifest), str(folder / "run"), str(folder / "nodes"), 3)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000003")
    return folder / "run", folder / "nodes"


def _resumed(folder: Path) -> dict[str, Any]:
    *_, last = (event for event in read_events(folder) if event["event"] == "resumed")
    return last


@pytest.mark.parametrize("lost", [(), (0,), (1,)])
def test_a_restart_goes_on_from_the_local_save_to_the_bit(
    manifest: Path, undisturbed: Path, tmp_path: Path, lost: tuple[int, ...]
) -> None:
    folder, nodes = _crashed(manifest, tmp_path)
    for rank in lost:
        shutil.rmtree(_folder(nodes, rank))
    assert run_ranks(2, _train, str(manifest), str(folder), str(nodes), None) == [STEPS] * 2
    event = _resumed(folder)
    assert (event["step"], event["lost_steps"], event["tier"]) == (2, 1, "local")
    assert _numbers(folder) == _numbers(undisturbed)
    ours, theirs = _values(folder), _values(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _restart(topology: Topology, manifest: str, folder: str, nodes: str) -> str:
    try:
        return f"step {_train(topology, manifest, folder, nodes, None)}"
    except OperatorFault as fault:
        return str(fault)


def test_a_start_without_a_folder_for_local_saves_records_why_it_ended(manifest: Path, tmp_path: Path) -> None:
    _folder(tmp_path, 0).write_text("a file")
    (line,) = run_ranks(1, _restart, str(manifest), str(tmp_path / "run"), str(tmp_path))
    (failed,) = (event for event in read_events(tmp_path / "run") if event["event"] == "attempt_failed")
    assert failed["reason"] == line
    assert "Name a folder that each node can write to" in line


def test_a_restart_beside_a_broken_disk_reads_the_checkpoint_and_makes_no_local_saves(
    manifest: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder, nodes = tmp_path / "run", tmp_path / "nodes"
    run_ranks(2, _train, str(manifest), str(folder), str(nodes), 3)
    shutil.rmtree(_folder(nodes, 1))
    _folder(nodes, 1).write_text("a file")
    assert run_ranks(2, _train, str(manifest), str(folder), str(nodes), None) == [STEPS] * 2
    event = _resumed(folder)
    assert (event["step"], event.get("tier")) == (3, None)
    failed, *saved = (event for event in read_events(folder) if event["attempt"] == 2 and "local" in event["event"])
    assert (failed["event"], saved) == ("local_checkpoint_failed", [])
    assert failed["reason"].endswith("Name a folder that each node can write to, or leave that node out")
    assert _numbers(folder) == _numbers(undisturbed)


def test_a_run_that_lost_both_tiers_does_not_start_from_scratch(manifest: Path, tmp_path: Path) -> None:
    folder, nodes = _crashed(manifest, tmp_path)
    shutil.rmtree(nodes)
    for line in run_ranks(2, _restart, str(manifest), str(folder), str(nodes)):
        assert "has no valid checkpoint, and this run has saved before" in line


def _train_with_skip(topology: Topology, manifest: str, folder: str, skip: list[list[int]], stop_after: int) -> int:
    values = _local_recipe(Path(manifest), Path(folder) / "run", Path(folder), topology.rank).snapshot()
    values["train"]["checkpoint_every"] = 2
    values["data"]["skip"] = skip
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return run(prepare(Recipe.model_validate(values), launch), topology, stop_after=stop_after).step


def test_a_changed_recipe_resumes_from_a_checkpoint(manifest: Path, tmp_path: Path) -> None:
    """`docs/recover.md`: newer checkpoints are moved away, and sequences behind the older one are skipped."""
    folder = tmp_path / "run"
    run_ranks(1, _train_with_skip, str(manifest), str(tmp_path), [], 4)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")  # leaves that of step 2 and a local save of step 3
    assert run_ranks(1, _train_with_skip, str(manifest), str(tmp_path), [[2 * BATCH, 3 * BATCH]], 3) == [3]
    assert (_resumed(folder)["step"], "tier" in _resumed(folder)) == (2, False)


class _Spike:
    """A loss spike at step 4, once: the run goes back to before it, and leaves out its sequences."""

    def __init__(self, trainer: Trainer) -> None:
        self._recovery, self._is_new = trainer._recovery, True

    def after_step(self, event: StepEvent) -> Request | None:
        if event.step != 4 or not self._is_new:
            return None
        self._is_new = False
        slots = {step: BATCH * (step - 1) for step in range(1, 5)}
        anomaly = Anomaly("loss_spike", "a spike", {})
        assert self._recovery.roll_back(anomaly, 4, slots_before=slots, slots_end=4 * BATCH)
        return Request.ROLL_BACK


def _train_with_spike(topology: Topology, manifest: str, folder: str, nodes: str, skip: list[list[int]]) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    made = _local_recipe(
        Path(manifest), Path(folder), Path(nodes), topology.rank, max_rollbacks=1, rollback_steps=1
    ).snapshot()
    made["data"]["skip"] = skip
    made["distributed"] |= {"shard": topology.shard_world, "vocab_group": topology.group_size}
    own, spikes = Trainer._hooks, dict[int, _Spike]()

    def hooks(trainer: Trainer, *arguments: Any, **keys: Any) -> list[Hook]:
        spike = spikes.setdefault(id(trainer), _Spike(trainer))
        return [*own(trainer, *arguments, **keys), *([] if skip else [spike])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_hooks", hooks)
        return run(prepare(Recipe.model_validate(made), launch), topology, stop_after=None).step


def test_a_rollback_goes_back_to_a_local_save(manifest: Path, tmp_path: Path) -> None:
    """To that of step 3, the newest before the spike, where the durable tier has nothing."""
    folder, skipped = tmp_path / "run", [[3 * BATCH, 4 * BATCH]]
    run_ranks(2, _train_with_spike, str(manifest), str(folder), str(tmp_path / "nodes"), [])
    (rollback,) = (event for event in read_events(folder) if event["event"] == "rollback")
    assert (rollback["to_step"], rollback["skipped_slots"]) == (3, skipped[0])
    assert (_resumed(folder)["step"], _resumed(folder)["tier"]) == (3, "local")
    run_ranks(2, _train_with_spike, str(manifest), str(tmp_path / "skips"), str(tmp_path / "other"), skipped)
    assert _numbers(folder) == _numbers(tmp_path / "skips")
