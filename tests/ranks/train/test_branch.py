"""A run that begins from another run's checkpoint: what it continues, what it may change, what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault, UserError
from megadistill.train.checkpoint.format import RNG_KEY, Checkpoint, newest_checkpoint
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from tests.corpora import small_data_set
from tests.ranks.harness import run_ranks
from tests.ranks.train.test_loop import recipe as small_recipe

WSD = {"kind": "wsd", "warmup_steps": 2, "decay_steps": 2, "final_ratio": 0.0}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return small_data_set(folder, sequence_length=64, heldout_fraction=0.3) / "train" / "manifest.json"


def _recipe(manifest: str, folder: str, changes: dict[str, Any]) -> Recipe:
    values = small_recipe(Path(manifest), Path(folder)).snapshot()
    values["train"] |= {"steps": 8, "schedule": WSD, "checkpoint_every": 2, "histograms_every": 0}
    values["checkpoint"] |= {"keep_last": 9}
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Recipe.model_validate(values)


def _train(topology: Topology, manifest: str, folder: str, changes: dict[str, Any]) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return run(prepare(_recipe(manifest, folder, changes), launch), topology, stop_after=None).step


def _start(world: int, manifest: Path, folder: Path, **changes: Any) -> None:
    run_ranks(world, _train, str(manifest), str(folder), {key.replace("__", "."): v for key, v in changes.items()})


def _metrics(folder: Path) -> dict[int, dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def _losses(folder: Path, *, after: int) -> dict[int, tuple[float, float, float, int]]:
    return {
        step: (line["loss"], line["grad_norm"], line["learning_rate"], line["tokens"])
        for step, line in _metrics(folder).items()
        if step > after
    }


def _state(folder: Path) -> dict[str, Any]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return {
        f"{kind}/{name}": checkpoint.read(f"{kind}/{name}", 0, math.prod(shape))
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name, shape in checkpoint.manifest.parameters.items()
    }


@pytest.fixture(scope="module")
def parent(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of 8 steps on 2 ranks, whose last two decay; its checkpoints are of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("parent") / "parent"
    _start(2, manifest, folder)
    return folder


@pytest.fixture(scope="module")
def branch(manifest: Path, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The steps of the parent after step 4, on 2 ranks too."""
    folder = tmp_path_factory.mktemp("branch") / "branch"
    _start(2, manifest, folder, run__begin_from=str(parent / "checkpoints" / "step-00000004"))
    return folder


def test_an_unchanged_branch_is_bitwise_its_parent(parent: Path, branch: Path) -> None:
    assert _losses(branch, after=0) == _losses(parent, after=4)
    theirs, ours = _state(parent), _state(branch)
    assert theirs.keys() == ours.keys()
    assert all(bool((theirs[key] == ours[key]).all()) for key in theirs)
    newest = newest_checkpoint(branch / "checkpoints")
    assert newest is not None
    their_newest = newest_checkpoint(parent / "checkpoints")
    assert their_newest is not None
    assert newest.manifest.cursor == their_newest.manifest.cursor
    assert newest.manifest.tokens == their_newest.manifest.tokens
    rng, their_rng = newest.rng_state(1, 2), their_newest.rng_state(1, 2)
    assert rng is not None
    assert their_rng is not None
    assert bool((rng == their_rng).all()), RNG_KEY


def test_the_records_name_the_parent(manifest: Path, parent: Path, branch: Path, tmp_path: Path) -> None:
    second, start = tmp_path / "second", Checkpoint(parent / "checkpoints" / "step-00000004")
    record = {"run": "parent", "step": 4, "sha256": start.manifest.sha256}
    assert json.loads((branch / "recipe.json").read_text())["parents"] == [record]
    newest = newest_checkpoint(branch / "checkpoints")
    assert newest is not None
    assert [each.model_dump() for each in newest.manifest.parents] == [record]
    events = [json.loads(line) for line in (branch / "events.jsonl").read_text().splitlines()]
    (branched,) = [event for event in events if event["event"] == "branched"]
    assert (branched["step"], branched["run"], branched["sha256"]) == (4, "parent", record["sha256"])
    _start(2, manifest, second, run__begin_from=str(branch / "checkpoints" / "step-00000006"))
    lineage = [each["run"] for each in json.loads((second / "recipe.json").read_text())["parents"]]
    assert lineage == ["parent", "branch"], "a branch of a branch names both"


def test_on_another_number_of_ranks_a_branch_is_its_parent_to_rounding(
    manifest: Path, parent: Path, tmp_path: Path
) -> None:
    branch = tmp_path / "branch"
    _start(1, manifest, branch, run__begin_from=str(parent / "checkpoints" / "step-00000004"))
    ours, theirs = _metrics(branch), _metrics(parent)
    assert list(ours) == [5, 6, 7, 8]
    for step in ours:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)


def test_a_stable_checkpoint_decays_again(manifest: Path, parent: Path, tmp_path: Path) -> None:
    """The parent's stable phase, cooled down over 4 steps instead of its own 2."""
    start = str(parent / "checkpoints" / "step-00000006")
    again = tmp_path / "again"
    _start(2, manifest, again, run__begin_from=start, train__steps=10, train__schedule={**WSD, "decay_steps": 4})
    rates = [line["learning_rate"] for line in _metrics(again).values()]
    assert rates == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0.0], abs=1e-18)


def test_a_run_in_its_stable_phase_is_trained_longer_in_place(manifest: Path, parent: Path, tmp_path: Path) -> None:
    """Bitwise the run that was to be as long from the start, whose steps it takes; a finished one is refused."""
    stopped, whole = tmp_path / "run", tmp_path / "whole"
    _start(2, manifest, whole, train__steps=10)
    shutil.copytree(parent, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000008")
    _start(2, manifest, stopped, train__steps=10)
    assert _losses(stopped, after=0) == _losses(whole, after=0)
    events = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    (changed,) = [event for event in events if event["event"] == "recipe_changed"]
    assert (changed["step"], changed["changes"]["train.steps"]) == (6, [8, 10])
    assert json.loads((stopped / "recipe.json").read_text())["recipe"]["train"]["steps"] == 10
    newest = newest_checkpoint(stopped / "checkpoints")
    assert newest is not None
    assert newest.manifest.recipe["train"]["steps"] == 10
    assert (stopped / "DONE").read_text() == "10\n"


def test_what_a_branch_may_change(manifest: Path, parent: Path, tmp_path: Path) -> None:
    """Rate, batch and objective; tokens are counted with each batch of its own."""
    branch = tmp_path / "branch"
    start = str(parent / "checkpoints" / "step-00000006")
    _start(2, manifest, branch, run__begin_from=start, train__global_batch=8, train__max_grad_norm=0.5)
    assert [line["tokens"] for line in _metrics(branch).values()] == [(6 * 4 + 8) * 64, (6 * 4 + 16) * 64]
    newest = newest_checkpoint(branch / "checkpoints")
    assert newest is not None
    assert newest.manifest.tokens == (6 * 4 + 16) * 64
    assert newest.manifest.cursor["next_slot"] == 6 * 4 + 16


def test_a_branch_that_has_saved_needs_its_parent_no_more(manifest: Path, parent: Path, tmp_path: Path) -> None:
    gone, branch = tmp_path / "gone", tmp_path / "branch"
    shutil.copytree(parent, gone)
    start = str(gone / "checkpoints" / "step-00000004")
    _start(2, manifest, branch, run__begin_from=start)
    shutil.rmtree(gone)
    shutil.rmtree(branch / "checkpoints" / "step-00000008")
    _start(2, manifest, branch, run__begin_from=start)
    assert _losses(branch, after=0) == _losses(parent, after=4)
    newest = newest_checkpoint(branch / "checkpoints")
    assert newest is not None
    assert [each.run for each in newest.manifest.parents] == ["gone"], "the record stays"
    assert [each["run"] for each in json.loads((branch / "recipe.json").read_text())["parents"]] == ["gone"]


def _refuses_damage(topology: Topology, manifest: str, folder: str, start: str) -> str:
    try:
        _train(topology, manifest, folder, {"run.begin_from": start})
    except OperatorFault as fault:
        return str(fault)
    return ""


def test_a_damaged_parent_is_refused_by_name_on_every_rank(manifest: Path, parent: Path, tmp_path: Path) -> None:
    """A flipped byte in the file that only rank 1 reads; the parent stays as it is."""
    copy = tmp_path / "parent"
    shutil.copytree(parent, copy)
    start = copy / "checkpoints" / "step-00000004"
    path = start / "rank-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    zero, one = run_ranks(2, _refuses_damage, str(manifest), str(tmp_path / "branch"), str(start))
    assert one.startswith(f"run.begin_from: {path} is damaged:")
    assert one.endswith("name another checkpoint")
    assert "rank 1" in zero
    assert sorted(each.name for each in (copy / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (2, 4, 6, 8)
    ]


def test_a_parent_with_other_steps_or_student_is_refused(manifest: Path, parent: Path, tmp_path: Path) -> None:
    start = str(parent / "checkpoints" / "step-00000006")
    with pytest.raises(UserError, match=r"is at step 6, train\.steps is 6"):
        prepare(
            _recipe(str(manifest), str(tmp_path / "a"), {"run.begin_from": start, "train.steps": 6}),
            Launch(0, 1, 0, 1),
        )
