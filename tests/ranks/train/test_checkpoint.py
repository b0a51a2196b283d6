"""Ranks that save and restore together: all of them see a save end after the same step, however unevenly they write."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megadistill.config.recipe import CheckpointSection
from megadistill.distributed.collectives import all_reduce_sum, barrier
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault, RestartFault
from megadistill.train.checkpoint import format as checkpoint
from megadistill.train.checkpoint import select, writer
from megadistill.train.checkpoint.attempt import Attempt, acquire
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import rank_file
from megadistill.train.checkpoint.select import latest_valid
from megadistill.train.checkpoint.writer import Saver, SaveResult
from tests.ranks import student_cases
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import Case, build, run_steps
from tests.unit.train.cases import manifest_of, save_checkpoint


def _saver(topology: Topology, run: str, **options: Any) -> Saver:
    section = CheckpointSection(**{"keep_last": 9, **options})
    return Saver(Path(run) / "checkpoints", topology, Attempt(Path(run), 1), section)


def _reduced(made: Saver, topology: Topology) -> dict[str, float]:
    """The flags of all ranks, summed: what the reduction of a step does."""
    mine = made.flags()
    summed = all_reduce_sum(torch.tensor(list(mine.values())), topology.world_group).tolist()
    return dict(zip(mine, summed, strict=True))


def _steps_to_the_end(made: Saver, topology: Topology, at_step: Callable[[int], None]) -> tuple[int, SaveResult]:
    """After which step the save ended, and how; `at_step` is what this rank does in a step."""
    for step in range(10_000):
        at_step(step)
        result = made.poll(_reduced(made, topology))
        if result is not None:
            return step, result
        time.sleep(0.001)
    raise AssertionError("the save never ended")


def _trains_on_while_it_saves(topology: Topology, run: str) -> dict[str, Any]:
    """Rank 1's disk takes a step longer than rank 0's; meanwhile the student moves on."""
    student = build(Case(persistence=10_000), topology)
    run_steps(Case(), student, topology, range(1))
    state = {**student.state.local(), "rng": torch.get_rng_state()}
    true = {name: value.clone() for name, value in state.items()}
    opened, write = threading.Event(), checkpoint.write_rank

    def held(*arguments: Any, **named: Any) -> Any:
        assert opened.wait(60)
        return write(*arguments, **named)

    writer.write_rank = held  # type: ignore[attr-defined]
    made = _saver(topology, run)
    began = made.start(state, manifest_of(1, world=topology.world, parameters=student.state.shapes))
    visible = []

    def at_step(step: int) -> None:
        visible.append(len(checkpoint_folders(Path(run) / "checkpoints")))
        if step < 2:
            run_steps(Case(), student, topology, range(step + 1, step + 2))
        if step == topology.rank:
            opened.set()

    ended, result = _steps_to_the_end(made, topology, at_step)
    made.close()
    assert result.path is not None
    saved = load_file(result.path / rank_file(topology.rank, topology.world))
    later = student.state.snapshot()
    checkpoint.Checkpoint(result.path).verify()
    return {
        "began": began,
        "ended": ended,
        "visible": visible[:2],
        "result": result,
        "as it was": saved.keys() == true.keys() and all(torch.equal(saved[name], true[name]) for name in true),
        "moved since": sum(not torch.equal(later[name], true[name]) for name in later),
    }


def test_what_is_saved_is_the_state_of_its_step_while_the_run_goes_on(tmp_path: Path) -> None:
    ranks = run_ranks(2, _trains_on_while_it_saves, str(tmp_path))
    for values in ranks:
        assert values["began"] == []
        assert values["visible"] == [0, 0], "not before every rank has written"
        assert values["ended"] == ranks[0]["ended"] >= 1
        assert values["result"].path == tmp_path / "checkpoints" / "step-00000001"
        assert values["as it was"]
        assert values["moved since"] > 10
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def _raises(error: OSError) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES = ("rank 1 writes", "rank 0 commits", "no room")


def _saves_that_fail(topology: Topology, run: str) -> dict[tuple[str, bool], tuple[int, SaveResult, list[str]]]:
    """Each failure, met while the run goes on and waited for: after which step, how, and what is left."""
    folder, results = Path(run) / "checkpoints", {}
    state = {"master/w": torch.full((3,), float(topology.rank))}
    made = _saver(topology, run)

    def save(step: int, *, waits: bool) -> tuple[int, SaveResult]:
        ended = made.start(state, manifest_of(step, world=topology.world))
        if ended:
            return -1, ended[-1]
        return (-2, made.finish()) if waits else _steps_to_the_end(made, topology, lambda step: None)

    save(1, waits=True)
    for waits in (False, True):
        for what in FAILURES:
            with pytest.MonkeyPatch.context() as patch:
                if what == "rank 1 writes" and topology.rank == 1:
                    patch.setattr(writer, "write_rank", _raises(FULL))
                elif what == "rank 0 commits" and topology.rank == 0:
                    patch.setattr(writer, "commit", _raises(FULL))
                elif what == "no room" and topology.rank == 0:
                    patch.setattr("shutil.disk_usage", _raises(FULL))
                step, result = save(2, waits=waits)
            barrier(topology.world_group)
            results[what, waits] = (step, result, sorted(path.name for path in folder.iterdir()))
            barrier(topology.world_group)
    save(3, waits=False)
    made.close()
    return results


def test_a_save_that_fails_on_one_rank_fails_on_all_after_the_same_step(tmp_path: Path) -> None:
    zero, one = run_ranks(2, _saves_that_fail, str(tmp_path))
    assert zero.keys() == one.keys()
    for (what, waits), (step, result, left) in zero.items():
        step_of_one, result_of_one, _ = one[what, waits]
        assert step == step_of_one
        assert result.path is result_of_one.path is None
        culprit, other = (result_of_one, result) if what == "rank 1 writes" else (result, result_of_one)
        assert "No space left" in culprit.problem
        elsewhere = f"see the log of rank {int(what == 'rank 1 writes')}"
        assert other.problem == (culprit.problem if what == "no room" else elsewhere)
        assert left == ["step-00000001"], "the temporary folder is gone, the older checkpoint is not"
    assert list(checkpoint_folders(tmp_path / "checkpoints")) == [1, 3], "and the next save works"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _selects_the_newest(topology: Topology, run: str) -> dict[str, Any]:
    """Finds what is damaged in the file that only rank 1 reads; then meets a disk that only rank 1 cannot read."""
    folder, attempt = Path(run) / "checkpoints", Attempt(Path(run), 1)
    select.READ_PAUSE_SECONDS = 0.0
    for step in (2, 4, 6):
        save_checkpoint(folder, {"master/w": torch.full((3,), float(step))}, step, rank=topology)
    if topology.rank == 0:
        _flip(folder / "step-00000006" / rank_file(1, 2))
    barrier(topology.world_group)
    newest, quarantined = latest_valid(folder, topology, attempt, saved_before=True)
    assert newest is not None
    quarantine = [(each.step, each.reason) for each in quarantined]
    values: dict[str, Any] = {"step": newest.manifest.step, "quarantine": quarantine}

    def fault(where: Path) -> str:
        try:
            latest_valid(where, topology, attempt, saved_before=False)
        except (RestartFault, OperatorFault) as met:
            return f"{type(met).__name__}: {met}"
        return ""

    with pytest.MonkeyPatch.context() as patch:
        if topology.rank == 1:
            patch.setattr(checkpoint, "record_of", _raises(OSError(errno.ESTALE, "Stale file handle")))
        values["stale"] = fault(folder)
    values["another folder"] = fault(folder if topology.rank == 0 else Path(run) / "elsewhere")
    barrier(topology.world_group)
    return values


def test_damage_on_one_rank_is_damage_for_all(tmp_path: Path) -> None:
    ranks = run_ranks(2, _selects_the_newest, str(tmp_path))
    for values in ranks:
        assert values["step"] == 4
        assert values["stale"].startswith("RestartFault: "), "not damage, and nothing is quarantined for it"
        assert values["another folder"].startswith("OperatorFault: ")
    assert ranks[0]["quarantine"] == [(6, "damaged: see the log of rank 1")]
    ((step, reason),) = ranks[1]["quarantine"]
    assert (step, f"{rank_file(1, 2)} is damaged" in reason) == (6, True)
    assert "Stale file handle" in ranks[1]["stale"]
    assert "step 0 on rank 1, step 4 on rank 0" in ranks[1]["another folder"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [".corrupt-a1-step-00000006", "step-00000002", "step-00000004"]


def _is_replaced_in_the_middle(topology: Topology, run: str) -> str:
    """The next attempt starts when this one's bytes are written, before it settles."""
    made = _saver(topology, run)
    made.start({"master/w": torch.ones(3)}, manifest_of(1, world=topology.world))
    barrier(topology.world_group)
    if topology.is_first:
        acquire(Path(run), {})
    try:
        return made.finish().problem or "saved"
    except OperatorFault as fault:
        return f"ended by: {fault}"


def test_no_rank_of_a_replaced_attempt_reports_a_save(tmp_path: Path) -> None:
    acquire(tmp_path, {})
    zero, one = run_ranks(2, _is_replaced_in_the_middle, str(tmp_path))
    assert zero.startswith("ended by: attempt 1 of")
    assert one == "see the log of rank 0"
    assert not checkpoint_folders(tmp_path / "checkpoints")


def _saves_a_step(topology: Topology, folder: str) -> None:
    student_cases.MULTIPLE = 264  # divides over all the numbers of ranks; in a process of its own
    student = build(Case(), topology)
    run_steps(Case(), student, topology, range(1))
    state = {**student.state.local(), "rng": torch.get_rng_state()}
    save_checkpoint(Path(folder), state, 1, rank=topology, parameters=student.state.shapes)


def _reads_it(topology: Topology, folder: str) -> tuple[dict[str, Tensor], list[str]]:
    """This rank's pieces as it holds them, and the files that it opened."""
    student_cases.MULTIPLE = 264
    student, opened, manifests, read = build(Case(), topology), list[str](), list[Path](), checkpoint.read_manifest

    def read_manifest(path: Path) -> checkpoint.CheckpointManifest:
        manifests.append(path)
        return read(path)

    checkpoint.read_manifest = read_manifest
    made, _ = select.verified(checkpoint_folders(Path(folder))[1], topology)
    assert made is not None
    assert len(manifests) == topology.is_first, "rank 0 reads the manifest for all"
    file = made._file

    def counted(rank: int) -> Any:
        opened.append(rank_file(rank, 4))
        return file(rank)

    made._file = counted  # type: ignore[method-assign]
    student.state.load(made.read)
    assert student.state.params_differing_from_master() == []
    return student.state.snapshot(), sorted(set(opened))


def test_any_number_of_ranks_reads_the_same_state_from_the_files_of_its_pieces(tmp_path: Path) -> None:
    run_ranks(4, _saves_a_step, str(tmp_path))
    files = [load_file(tmp_path / "step-00000001" / rank_file(rank, 4)) for rank in range(4)]
    for world, most in ((4, 1), (8, 1), (2, 2), (3, 2)):
        results = run_ranks(world, _reads_it, str(tmp_path))
        for rank, (_, opened) in enumerate(results):
            assert len(opened) <= most, (world, rank, opened)
        for key in files[0].keys() - {"rng"}:
            pieces = [state[key] for state, _ in results]
            if key == "optimizer_step":
                assert [each.tolist() for each in pieces] == [[1.0]] * world
            else:
                assert torch.equal(torch.cat(pieces), torch.cat([file[key] for file in files])), (world, key)
