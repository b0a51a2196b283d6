"""Selection of a checkpoint: a damaged one is quarantined, an unreadable one is not, nothing is silent."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megadistill.errors import OperatorFault, RestartFault
from megadistill.train.checkpoint import format as checkpoint_module
from megadistill.train.checkpoint import select
from megadistill.train.checkpoint.attempt import Attempt, acquire
from megadistill.train.checkpoint.folders import checkpoint_folders, checkpoint_name
from megadistill.train.checkpoint.format import Checkpoint, CheckpointManifest
from megadistill.train.checkpoint.select import Quarantined, latest_valid
from tests.unit.train.cases import save_checkpoint, topology

FILE = "rank-00000-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 6, which the first attempt wrote."""
    acquire(tmp_path, {})
    for step in (2, 4, 6):
        save_checkpoint(tmp_path / "checkpoints", _state(step), step)
    return tmp_path / "checkpoints"


@pytest.fixture
def attempt(folder: Path) -> Attempt:
    return acquire(folder.parent, {})


def _state(step: int) -> dict[str, Tensor]:
    return {"master/w": torch.full((12,), float(step))}


def _valid(
    folder: Path,
    attempt: Attempt,
    *,
    saved_before: bool = True,
    is_abandoned: Callable[[CheckpointManifest], bool] = lambda manifest: False,
) -> tuple[Checkpoint | None, list[Quarantined]]:
    return latest_valid(folder, topology(), attempt, saved_before=saved_before, is_abandoned=is_abandoned)


def _step(checkpoint: Checkpoint | None) -> int:
    assert checkpoint is not None
    assert torch.equal(checkpoint.read("master/w", 0, 12), _state(checkpoint.manifest.step)["master/w"])
    return checkpoint.manifest.step


def _cut(path: Path) -> None:
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray((path / FILE).read_bytes())
    content[-1] ^= 1
    (path / FILE).write_bytes(content)


def _no_file(path: Path) -> None:
    (path / FILE).unlink()


def _no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _half_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:100])


def _other_step(path: Path) -> None:
    values = json.loads((path / "manifest.json").read_bytes()) | {"step": 7}
    (path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")


def _later_format(path: Path) -> None:
    values = json.loads((path / "manifest.json").read_bytes()) | {"format": 9}
    (path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")


def _a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


DAMAGES = [_cut, _flip, _no_file, _no_manifest, _half_manifest, _other_step, _later_format, _a_file]


def test_the_newest_is_taken_and_nothing_is_touched(folder: Path, attempt: Attempt) -> None:
    checkpoint, quarantined = _valid(folder, attempt)
    assert (_step(checkpoint), quarantined) == (6, [])
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_reported_quarantined_and_skipped(
    folder: Path, attempt: Attempt, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "step-00000006")
    left = sorted((folder / "step-00000006").glob("*"))
    checkpoint, quarantined = _valid(folder, attempt)
    assert _step(checkpoint) == 4
    target = folder / ".corrupt-a2-step-00000006"
    assert [(each.step, each.path) for each in quarantined] == [(6, target)]
    assert "step-00000006" in quarantined[0].reason
    assert quarantined[0].reason in caplog.messages
    assert [path.name for path in left] == sorted(path.name for path in target.glob("*")), "nothing is deleted"
    assert list(checkpoint_folders(folder)) == [2, 4]
    again, quarantined = _valid(folder, attempt)
    assert (_step(again), quarantined) == (4, [])


def test_two_damaged_in_a_row_are_passed_over(folder: Path, attempt: Attempt) -> None:
    _flip(folder / "step-00000006")
    _no_file(folder / "step-00000004")
    checkpoint, quarantined = _valid(folder, attempt)
    assert _step(checkpoint) == 2
    assert [each.step for each in quarantined] == [6, 4]


def test_a_damaged_one_behind_a_whole_one_is_not_looked_at(folder: Path, attempt: Attempt) -> None:
    _flip(folder / "step-00000004")
    assert _step(_valid(folder, attempt)[0]) == 6
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


def test_without_a_valid_one_the_run_does_not_start_from_scratch(folder: Path, attempt: Attempt) -> None:
    for step in (2, 4, 6):
        _flip(folder / checkpoint_name(step))
    for _ in range(2):  # the second time only quarantined ones are there
        with pytest.raises(OperatorFault, match=r"does not start from scratch\. Restore a checkpoint") as caught:
            _valid(folder, attempt, saved_before=False)
        assert "\n" not in str(caught.value)
        attempt = acquire(attempt.folder, {})
    assert len(list(folder.glob(".corrupt-a2-*"))) == 3
    (folder / ".corrupt-a2-step-00000004").rename(folder / "step-00000004")
    _flip(folder / "step-00000004")  # the way out, with the byte put right
    assert _step(_valid(folder, attempt)[0]) == 4


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_has_saved_and_has_no_checkpoint_does_not_start_from_scratch(tmp_path: Path, there: bool) -> None:
    attempt, empty = acquire(tmp_path, {}), tmp_path / "checkpoints"
    if there:
        empty.mkdir()
        (empty / ".tmp-step-00000002-a1").mkdir()
    assert _valid(empty, attempt, saved_before=False) == (None, []), "one that has never saved does"
    with pytest.raises(OperatorFault, match="has no valid checkpoint"):
        _valid(empty, attempt)


class Failing:
    """A read that the disk refuses so many times; then it works."""

    def __init__(self, read: Callable[..., object], times: int) -> None:
        self._read, self.left = read, times

    def __call__(self, *arguments: object) -> object:
        if self.left > 0:
            self.left -= 1
            raise OSError(errno.EIO, "Input/output error")
        return self._read(*arguments)


@pytest.mark.parametrize("what", ["a file", "a manifest", "the folder"])
def test_what_cannot_be_read_is_tried_again_and_never_quarantined(
    folder: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(select, "READ_PAUSE_SECONDS", 0.0)
    place, name = {
        "a file": (checkpoint_module, "record_of"),
        "a manifest": (checkpoint_module, "read_manifest"),
        "the folder": (select, "checkpoint_folders"),
    }[what]
    read = getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, Failing(read, times=2))
        checkpoint, quarantined = _valid(folder, attempt)
        assert (_step(checkpoint), quarantined) == (6, [])
        failing = Failing(read, times=99)
        patch.setattr(place, name, failing)
        with pytest.raises(RestartFault, match=r"cannot be read: \[Errno 5\] Input/output error") as caught:
            _valid(folder, attempt)
        assert str(folder) in str(caught.value)
        assert failing.left == 99 - select.READ_ATTEMPTS
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


def test_a_damage_behind_a_passing_error_is_still_damage(
    folder: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "READ_PAUSE_SECONDS", 0.0)
    _flip(folder / "step-00000006")
    monkeypatch.setattr(checkpoint_module, "record_of", Failing(checkpoint_module.record_of, times=1))
    assert _step(_valid(folder, attempt)[0]) == 4


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place stands for what root may not be refused."""
    monkeypatch.setattr(select, "READ_PAUSE_SECONDS", 0.0)
    (tmp_path / "checkpoints").write_bytes(b"")
    with pytest.raises(RestartFault, match="cannot be read"):
        _valid(tmp_path / "checkpoints", acquire(tmp_path, {}), saved_before=False)


def test_an_older_attempt_quarantines_nothing(folder: Path) -> None:
    _flip(folder / "step-00000006")
    first = Attempt(folder.parent, 1)
    acquire(folder.parent, {})
    with pytest.raises(OperatorFault, match="attempt 1 of"):
        _valid(folder, first)
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


def test_an_abandoned_checkpoint_is_renamed(folder: Path, attempt: Attempt) -> None:
    checkpoint, quarantined = _valid(folder, attempt, is_abandoned=lambda manifest: manifest.step > 2)
    assert _step(checkpoint) == 2
    assert [(each.step, each.path.name) for each in quarantined] == [
        (6, ".rolled-back-a2-step-00000006"),
        (4, ".rolled-back-a2-step-00000004"),
    ]
    assert all(each.path.is_dir() for each in quarantined)
    assert "rollback" in quarantined[0].reason


def test_the_newest_two_abandoned_checkpoints_stay(folder: Path, attempt: Attempt) -> None:
    for step in (8, 10):
        save_checkpoint(folder, _state(step), step, attempt=2)
    _valid(folder, attempt, is_abandoned=lambda manifest: manifest.step > 2)
    expected = [".rolled-back-a2-step-00000008", ".rolled-back-a2-step-00000010"]
    assert sorted(path.name for path in folder.glob(".*")) == sorted(expected)


def test_one_attempt_may_abandon_the_same_step_twice(folder: Path, attempt: Attempt) -> None:
    for _ in range(2):
        checkpoint, quarantined = _valid(folder, attempt, is_abandoned=lambda manifest: manifest.step > 4)
        assert (_step(checkpoint), [each.step for each in quarantined]) == (4, [6])
        save_checkpoint(folder, _state(6), 6, attempt=2)
    assert sorted(path.name for path in folder.glob(".*")) == [".rolled-back-a2-step-00000006"]


def test_a_damaged_abandoned_checkpoint_is_damaged(folder: Path, attempt: Attempt) -> None:
    _flip(folder / "step-00000006")
    _, quarantined = _valid(folder, attempt, is_abandoned=lambda manifest: manifest.step > 4)
    assert [each.path.name for each in quarantined] == [".corrupt-a2-step-00000006"]
