"""Saves in a world of one: what fails changes nothing, what was replaced by a later attempt does nothing.

Several ranks that write together are in tests/ranks/train/test_checkpoint.py.
"""

import os
import resource
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import CheckpointSection
from megadistill.errors import OperatorFault, RestartFault
from megadistill.train.checkpoint import format as checkpoint_module
from megadistill.train.checkpoint import writer as writer_module
from megadistill.train.checkpoint.attempt import Attempt, acquire
from megadistill.train.checkpoint.folders import checkpoint_folders, checkpoint_name
from megadistill.train.checkpoint.format import Checkpoint, CheckpointManifest, newest_checkpoint
from megadistill.train.checkpoint.writer import SAVE_FLAGS, Saver, SaveResult, require_saved
from megadistill.units import readable
from tests.unit.train.cases import manifest_of, topology

FILE = "rank-00000-of-00001.safetensors"
BYTES = 4 * 1000


def _state(seed: int) -> dict[str, Tensor]:
    return {"master/w": torch.randn(1000, generator=torch.Generator().manual_seed(seed))}


def _manifest(step: int) -> CheckpointManifest:
    return manifest_of(step, parameters={"w": (1000,)})


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return acquire(tmp_path, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@contextmanager
def _saver(
    attempt: Attempt, *, asynchronous: bool = True, keep_last: int = 9, keep_every: int = 0, stable_steps: int = 0
) -> Iterator[Saver]:
    section = CheckpointSection(asynchronous=asynchronous, keep_last=keep_last, keep_every=keep_every)
    made = Saver(attempt.folder / "checkpoints", topology(), attempt, section, stable_steps=stable_steps)
    yield made
    made.close()


def _polled(saver: Saver) -> SaveResult:
    """Takes steps until the save under way has ended; the sums over a world of one are its own flags."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        result = saver.poll(saver.flags())
        if result is not None:
            return result
        time.sleep(0.001)
    raise AssertionError("the save never ended")


def _save(saver: Saver, step: int) -> SaveResult:
    """Whichever way the saver saves; no save is under way before."""
    ended = saver.start(_state(step), _manifest(step))
    return ended[-1] if ended else _polled(saver)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _content(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def _require_whole(folder: Path, *steps: int) -> None:
    """These checkpoints, whole, and nothing else."""
    assert _names(folder) == [checkpoint_name(step) for step in steps]
    for step in steps:
        checkpoint = Checkpoint(folder / checkpoint_name(step))
        checkpoint.verify()
        assert torch.equal(checkpoint.read("master/w", 0, 1000), _state(step)["master/w"])


class Gate:
    """Holds the writing thread before it writes, as a slow disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        write = checkpoint_module.write_rank

        def held(*arguments: Any, **named: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(30)
            return write(*arguments, **named)

        monkeypatch.setattr(writer_module, "write_rank", held)


def test_saving_meanwhile_writes_the_same_bytes_as_waiting(tmp_path: Path) -> None:
    contents = []
    for asynchronous in (True, False):
        attempt = acquire(tmp_path / str(asynchronous), {})
        with _saver(attempt, asynchronous=asynchronous) as saver:
            result = _save(saver, 4)
        assert result.path == attempt.folder / "checkpoints" / "step-00000004"
        _require_whole(attempt.folder / "checkpoints", 4)
        assert (result.step, result.problem, result.bytes, result.removed) == (4, None, BYTES, ())
        assert result.write_seconds > 0
        contents.append(_content(result.path))
    assert contents[0] == contents[1]


def test_a_save_goes_on_while_the_run_does(attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with _saver(attempt) as saver:
        assert not saver.busy
        assert saver.poll(saver.flags()) is None
        assert saver.start(_state(4), _manifest(4)) == []
        for _ in range(3):
            assert saver.busy
            assert saver.flags() == dict.fromkeys(SAVE_FLAGS, 0.0)
            assert saver.poll(saver.flags()) is None
        assert newest_checkpoint(folder) is None
        assert _names(folder) == [".tmp-step-00000004-a1"]
        gate.opened.set()
        result = _polled(saver)
        assert not saver.busy
    assert min(result.stall_seconds, result.write_seconds) > 0
    _require_whole(folder, 4)


def test_the_run_may_change_its_tensors_once_a_save_has_started(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    state = _state(4)
    with _saver(attempt) as saver:
        saver.start(state, _manifest(4))
        state["master/w"].zero_()
        gate.opened.set()
        assert saver.finish().step == 4
    _require_whole(folder, 4)


def test_the_next_save_waits_for_the_one_before(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with _saver(attempt) as saver:
        saver.start(_state(4), _manifest(4))
        finish = saver.finish

        def waits() -> SaveResult:
            threading.Timer(0.2, gate.opened.set).start()
            return finish()

        monkeypatch.setattr(saver, "finish", waits)
        (ended,) = saver.start(_state(8), _manifest(8))
        assert (ended.step, ended.path) == (4, folder / "step-00000004")
        assert ended.stall_seconds > 0.02, "what the run waited for it"
        assert saver.finish().step == 8
    _require_whole(folder, 4, 8)


@pytest.mark.parametrize("polls", range(4))
def test_a_save_can_be_waited_for_at_any_state(attempt: Attempt, folder: Path, polls: int) -> None:
    with _saver(attempt) as saver:
        saver.start(_state(4), _manifest(4))
        result = None
        for _ in range(polls):
            time.sleep(0.01)
            result = result or saver.poll(saver.flags())
        result = result or saver.finish()
        assert result.path is not None
        assert not saver.busy
    _require_whole(folder, 4)


@contextmanager
def _full_disk(free: int) -> Iterator[None]:
    """No file of this process may grow past `free` bytes: the system's own error, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _fails(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("where", ["file", "sync", "record", "manifest", "name", "no room"])
def test_what_the_disk_refuses_leaves_everything_as_it_was(
    attempt: Attempt,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    asynchronous: bool,
) -> None:
    with _saver(attempt, asynchronous=asynchronous, keep_last=1) as saver:
        _save(saver, 4)
        full = OSError(28, "No space left on device")
        with monkeypatch.context() as patch:
            if where == "file":
                with _full_disk(BYTES):
                    result = _save(saver, 8)
            else:
                if where == "sync":
                    patch.setattr(os, "fsync", _fails(full))
                elif where == "record":
                    patch.setattr(checkpoint_module, "write_file", _fails(full))
                elif where == "manifest":
                    patch.setattr(checkpoint_module, "_own_sha256", _fails(full))
                elif where == "name":
                    patch.setattr(Path, "rename", _fails(full))
                else:
                    patch.setattr(shutil, "disk_usage", _fails(full))
                result = _save(saver, 8)
                assert "No space left on device" in (result.problem or "")
        assert result.path is None
        assert result.step == 8
        assert "\n" not in (result.problem or "")
        if where != "no room":
            assert (result.problem or "").removeprefix("rank 0: ") in caplog.text
        assert not saver.busy
        _require_whole(folder, 4)
        with pytest.raises(RestartFault, match=r"^checkpoint of step 8 not written: .*Older ones"):
            require_saved(result)
        assert require_saved(_save(saver, 12)).path == folder / "step-00000012"
    _require_whole(folder, 12)


Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(("free", "fits"), [(BYTES, False), (int(1.05 * BYTES) - 1, False), (int(1.05 * BYTES), True)])
def test_a_checkpoint_that_does_not_fit_is_not_started(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    with _saver(attempt) as saver:
        _save(saver, 4)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
        monkeypatch.setattr(writer_module, "write_rank", checkpoint_module.write_rank if fits else _fails(KeyError()))
        ended = saver.start(_state(8), _manifest(8))
        if fits:
            assert ended == []
            assert _polled(saver).path is not None
            return
        (result,) = ended
        assert (result.step, result.path) == (8, None)
        assert f"{folder} has {readable(free, 'B')} free, a checkpoint needs 4.2 kB" in (result.problem or "")
        assert not saver.busy
    _require_whole(folder, 4)


def test_what_is_in_the_way_is_named(attempt: Attempt, folder: Path) -> None:
    with _saver(attempt) as saver:
        (folder / ".tmp-step-00000004-a1").write_bytes(b"in the way")
        (result,) = saver.start(_state(4), _manifest(4))
        assert ".tmp-step-00000004-a1" in (result.problem or "")
        (folder / "step-00000008").mkdir()
        (folder / "step-00000008" / "mine").write_bytes(b"")
        assert "step-00000008" in (_save(saver, 8).problem or "")
        assert _names(folder / "step-00000008") == ["mine"], "a name never replaces another"


def test_a_kill_after_the_bytes_leaves_no_checkpoint_and_the_next_attempt_cleans(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _saver(attempt) as saver:
        _save(saver, 4)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", _fails(KeyboardInterrupt()))
            saver.start(_state(8), _manifest(8))
            with pytest.raises(KeyboardInterrupt):
                saver.finish()
    left = folder / ".tmp-step-00000008-a1"
    assert {"manifest.json", FILE} <= set(_names(left)), "all bytes were there"
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.manifest.step == 4
    with _saver(acquire(attempt.folder, {})):
        _require_whole(folder, 4)


def test_a_start_removes_what_others_began_and_nothing_else(attempt: Attempt, folder: Path) -> None:
    with _saver(attempt) as saver:
        _save(saver, 4)
    others = [".corrupt-a1-step-00000002", ".rolled-back-a1-step-00000003", "notes"]
    for name in (*others, ".tmp-step-00000008-a1", ".removed-step-00000001"):
        shutil.copytree(folder / "step-00000004", folder / name)
    with _saver(acquire(attempt.folder, {})):
        assert _names(folder) == sorted([*others, "step-00000004"])
    (folder / ".tmp-step-00000012-a2").mkdir()
    with pytest.raises(OperatorFault, match="attempt 1 of"):
        _saver(attempt).__enter__()
    assert (folder / ".tmp-step-00000012-a2").exists(), "the newer attempt's is not an earlier one's"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_thawed_attempt_does_not_even_begin(attempt: Attempt, folder: Path, asynchronous: bool) -> None:
    with _saver(attempt, asynchronous=asynchronous) as saver:
        acquire(attempt.folder, {})
        with pytest.raises(OperatorFault, match="attempt 1 of"):
            saver.start(_state(4), _manifest(4))
    assert _names(folder) == []


@pytest.mark.parametrize("when", ["before its bytes", "after its bytes"])
@pytest.mark.parametrize("waits", [False, True])
def test_an_attempt_that_thaws_in_the_middle_of_a_save_changes_nothing(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch, when: str, waits: bool
) -> None:
    """The later one resumes, deletes what it does not know, and has the same step saved before the first wakes up."""
    gate = Gate(monkeypatch)
    with _saver(attempt) as old:
        old.start(_state(99), _manifest(8))
        assert gate.reached.wait(30)
        if when == "after its bytes":
            gate.opened.set()
            while not old.flags()["save_ended"]:
                time.sleep(0.001)
        second = acquire(attempt.folder, {})
        monkeypatch.setattr(writer_module, "write_rank", checkpoint_module.write_rank)
        with _saver(second, keep_last=1) as new:
            _save(new, 4)
            _save(new, 8)
            (folder / ".tmp-step-00000012-a2").mkdir()
            before = _content(folder / "step-00000008")
            gate.opened.set()
            try:
                result = old.finish() if waits else _polled(old)
                assert result.path is None
            except OperatorFault as fault:
                assert "attempt 1 of" in str(fault)  # noqa: PT017
            assert _content(folder / "step-00000008") == before
            assert _names(folder) == [".tmp-step-00000012-a2", "step-00000008"]
    (folder / ".tmp-step-00000012-a2").rmdir()
    _require_whole(folder, 8)


@pytest.mark.parametrize("waits", [False, True])
def test_an_attempt_that_is_replaced_before_its_commit_publishes_nothing(
    attempt: Attempt, folder: Path, waits: bool
) -> None:
    """The later one has only just started: it has deleted nothing yet, and may already have looked for the newest."""
    with _saver(attempt) as saver:
        saver.start(_state(4), _manifest(4))
        while not saver.flags()["save_ended"]:
            time.sleep(0.001)
        acquire(attempt.folder, {})
        with pytest.raises(OperatorFault, match="attempt 1 of"):
            saver.finish() if waits else _polled(saver)
    assert _names(folder) == [".tmp-step-00000004-a1"], "it is the later one's to delete"


def test_an_attempt_that_is_replaced_after_its_commit_deletes_nothing(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkpoint_module.commit

    def committed(*arguments: Any) -> None:
        commit(*arguments)
        acquire(attempt.folder, {})

    with _saver(attempt, keep_last=1) as saver:
        _save(saver, 4)
        monkeypatch.setattr(writer_module, "commit", committed)
        result = _save(saver, 8)
    assert result.removed == ()
    _require_whole(folder, 4, 8)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [(1, 0, [9]), (3, 0, [7, 8, 9]), (2, 4, [4, 8, 9]), (1, 1, list(range(1, 10))), (20, 0, list(range(1, 10)))],
)
def test_the_last_few_stay_and_every_nth(
    attempt: Attempt, folder: Path, asynchronous: bool, keep_last: int, keep_every: int, expected: list[int]
) -> None:
    removed: list[str] = []
    with _saver(attempt, asynchronous=asynchronous, keep_last=keep_last, keep_every=keep_every) as saver:
        for step in range(1, 10):
            result = _save(saver, step)
            removed += result.removed
            assert list(checkpoint_folders(folder))[-keep_last:] == list(range(1, step + 1))[-keep_last:]
    _require_whole(folder, *expected)
    assert removed == [checkpoint_name(step) for step in range(1, 10) if step not in expected]


def test_the_checkpoint_before_a_decay_stays(attempt: Attempt, folder: Path) -> None:
    with _saver(attempt, keep_last=1, stable_steps=3) as saver:
        for step in range(1, 7):
            _save(saver, step)
    _require_whole(folder, 3, 6)


def test_nothing_is_deleted_before_a_newer_one_is_whole(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def removing(path: Path) -> None:
        newest = newest_checkpoint(folder)
        assert newest is not None
        newest.verify()
        seen.append((path.name, newest.manifest.step))
        shutil.rmtree(path)

    monkeypatch.setattr(writer_module, "remove", removing)
    with _saver(attempt, keep_last=1) as saver:
        for step in (4, 8):
            assert _save(saver, step).problem is None
    assert seen == [("step-00000004", 8)]


def test_a_kill_in_the_middle_of_a_deletion_leaves_no_half_checkpoint(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_tree = shutil.rmtree

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            (path / FILE).unlink()
            raise KeyboardInterrupt

    with _saver(attempt, keep_last=1) as saver:
        _save(saver, 4)
        monkeypatch.setattr(shutil, "rmtree", killed)
        saver.start(_state(8), _manifest(8))
        with pytest.raises(KeyboardInterrupt):
            saver.finish()
    monkeypatch.setattr(shutil, "rmtree", remove_tree)
    assert list(checkpoint_folders(folder)) == [8]
    with _saver(acquire(attempt.folder, {})):
        _require_whole(folder, 8)


def test_what_cannot_be_deleted_makes_no_save_fail(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with _saver(attempt, keep_last=1) as saver:
        _save(saver, 4)
        with monkeypatch.context() as patch:
            patch.setattr(writer_module, "remove", _fails(PermissionError(13, "Permission denied")))
            result = _save(saver, 8)
        assert (result.path, result.removed) == (folder / "step-00000008", ())
        assert f"old checkpoint {folder / 'step-00000004'} cannot be deleted" in caplog.text
        _require_whole(folder, 4, 8)
        assert _save(saver, 12).removed == ("step-00000004", "step-00000008"), "it is tried again"


def test_an_end_does_not_wait_for_the_disk(attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that dies of something else must not wait behind a disk that hangs."""
    gate = Gate(monkeypatch)
    with _saver(attempt) as saver:
        saver.start(_state(4), _manifest(4))
        assert gate.reached.wait(30)
    assert saver.flags()["save_ended"] == 0.0, "the disk still hangs"
    gate.opened.set()
    saver._thread.shutdown(wait=True)
    assert newest_checkpoint(folder) is None


def test_the_thread_that_waits_for_the_copies_is_on_the_device_of_its_rank(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread has the first device of the node, and would take memory there."""
    device, used = torch.device("lazy", 3), list[tuple[torch.device, int]]()
    monkeypatch.setattr(torch, "Stream", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda each: used.append((each, threading.get_ident())))
    rank = replace(topology(), device=device)
    saver = Saver(attempt.folder / "checkpoints", rank, attempt, CheckpointSection())
    thread = saver._thread.submit(threading.get_ident).result()
    saver.close()
    assert used == [(device, thread)]
