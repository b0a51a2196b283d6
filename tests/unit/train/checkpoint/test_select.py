"""Which checkpoint a run goes on from: what is damaged is set aside, what cannot be read is not, nothing is silent."""

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
from megadistill.train.checkpoint import select as store
from megadistill.train.checkpoint.attempt import Attempt, claim
from megadistill.train.checkpoint.format import Checkpoint, CheckpointManifest, checkpoint_folders, checkpoint_name
from megadistill.train.checkpoint.select import SetAside, newest_valid
from tests.unit.train.cases import save_checkpoint, topology

FILE = "rank-00000-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 6, which the first attempt wrote."""
    claim(tmp_path, {})
    for step in (2, 4, 6):
        save_checkpoint(tmp_path / "checkpoints", _state(step), step)
    return tmp_path / "checkpoints"


@pytest.fixture
def attempt(folder: Path) -> Attempt:
    return claim(folder.parent, {})


def _state(step: int) -> dict[str, Tensor]:
    return {"master/w": torch.full((5,), float(step))}


def _valid(
    folder: Path,
    attempt: Attempt,
    *,
    saved_before: bool = True,
    abandoned: Callable[[CheckpointManifest], bool] = lambda manifest: False,
) -> tuple[Checkpoint | None, list[SetAside]]:
    return newest_valid(folder, topology(), attempt, saved_before=saved_before, abandoned=abandoned)


def _step(found: Checkpoint | None) -> int:
    assert found is not None
    assert torch.equal(found.read("master/w", 0, 5), _state(found.manifest.step)["master/w"])
    return found.manifest.step


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
    found, aside = _valid(folder, attempt)
    assert (_step(found), aside) == (6, [])
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_set_aside_and_passed_over(
    folder: Path, attempt: Attempt, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "step-00000006")
    left = sorted((folder / "step-00000006").glob("*"))
    found, aside = _valid(folder, attempt)
    assert _step(found) == 4
    kept = folder / ".corrupt-a2-step-00000006"
    assert [(each.step, each.path) for each in aside] == [(6, kept)]
    assert "step-00000006" in aside[0].reason
    assert f"megadistill: rank 0: {aside[0].reason}\n" in capfd.readouterr().err
    assert [path.name for path in left] == sorted(path.name for path in kept.glob("*")), "a person can look at it"
    assert list(checkpoint_folders(folder)) == [2, 4]
    again, aside = _valid(folder, attempt)
    assert (_step(again), aside) == (4, [])


def test_two_damaged_in_a_row_are_passed_over(folder: Path, attempt: Attempt) -> None:
    _flip(folder / "step-00000006")
    _no_file(folder / "step-00000004")
    found, aside = _valid(folder, attempt)
    assert _step(found) == 2
    assert [each.step for each in aside] == [6, 4]


def test_a_damaged_one_behind_a_whole_one_is_not_looked_at(folder: Path, attempt: Attempt) -> None:
    _flip(folder / "step-00000004")
    assert _step(_valid(folder, attempt)[0]) == 6
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


def test_where_none_is_left_the_run_does_not_begin_from_scratch(folder: Path, attempt: Attempt) -> None:
    for step in (2, 4, 6):
        _flip(folder / checkpoint_name(step))
    for _ in range(2):  # the second time nothing is there but what was set aside
        with pytest.raises(OperatorFault, match=r"does not begin from scratch\. Bring a checkpoint back") as caught:
            _valid(folder, attempt, saved_before=False)
        assert "\n" not in str(caught.value)
        attempt = claim(attempt.folder, {})
    assert len(list(folder.glob(".corrupt-a2-*"))) == 3
    (folder / ".corrupt-a2-step-00000004").rename(folder / "step-00000004")
    _flip(folder / "step-00000004")  # the way out, with the byte put right
    assert _step(_valid(folder, attempt)[0]) == 4


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_has_saved_and_finds_nothing_does_not_begin_from_scratch(tmp_path: Path, there: bool) -> None:
    attempt, empty = claim(tmp_path, {}), tmp_path / "checkpoints"
    if there:
        empty.mkdir()
        (empty / ".tmp-step-00000002-a1").mkdir()
    assert _valid(empty, attempt, saved_before=False) == (None, []), "one that has never saved does"
    with pytest.raises(OperatorFault, match="holds no checkpoint that can be used"):
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
def test_what_cannot_be_read_is_tried_again_and_never_set_aside(
    folder: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(store, "READ_PAUSE_SECONDS", 0.0)
    place, name = {
        "a file": (checkpoint_module, "record_of"),
        "a manifest": (checkpoint_module, "_read_manifest"),
        "the folder": (store, "checkpoint_folders"),
    }[what]
    read = getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, Failing(read, times=2))
        found, aside = _valid(folder, attempt)
        assert (_step(found), aside) == (6, [])
        failing = Failing(read, times=99)
        patch.setattr(place, name, failing)
        with pytest.raises(RestartFault, match=r"cannot be read: \[Errno 5\] Input/output error") as caught:
            _valid(folder, attempt)
        assert str(folder) in str(caught.value)
        assert failing.left == 99 - store.READ_ATTEMPTS
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


def test_a_damage_behind_a_passing_error_is_still_damage(
    folder: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "READ_PAUSE_SECONDS", 0.0)
    _flip(folder / "step-00000006")
    monkeypatch.setattr(checkpoint_module, "record_of", Failing(checkpoint_module.record_of, times=1))
    assert _step(_valid(folder, attempt)[0]) == 4


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place stands for what root may not be refused."""
    monkeypatch.setattr(store, "READ_PAUSE_SECONDS", 0.0)
    (tmp_path / "checkpoints").write_bytes(b"")
    with pytest.raises(RestartFault, match="cannot be read"):
        _valid(tmp_path / "checkpoints", claim(tmp_path, {}), saved_before=False)


def test_a_thawed_attempt_sets_nothing_aside(folder: Path) -> None:
    _flip(folder / "step-00000006")
    first = Attempt(folder.parent, 1)
    claim(folder.parent, {})
    with pytest.raises(OperatorFault, match="attempt 1 of"):
        _valid(folder, first)
    assert list(checkpoint_folders(folder)) == [2, 4, 6]


def test_a_line_that_was_given_up_is_kept_under_another_name(folder: Path, attempt: Attempt) -> None:
    found, aside = _valid(folder, attempt, abandoned=lambda manifest: manifest.step > 2)
    assert _step(found) == 2
    assert [(each.step, each.path.name) for each in aside] == [
        (6, ".rolled-back-a2-step-00000006"),
        (4, ".rolled-back-a2-step-00000004"),
    ]
    assert all(each.path.is_dir() for each in aside)
    assert "rollback" in aside[0].reason


def test_of_lines_that_were_given_up_the_newest_two_are_kept(folder: Path, attempt: Attempt) -> None:
    for step in (8, 10):
        save_checkpoint(folder, _state(step), step, attempt=2)
    _valid(folder, attempt, abandoned=lambda manifest: manifest.step > 2)
    kept = [".rolled-back-a2-step-00000008", ".rolled-back-a2-step-00000010"]
    assert sorted(path.name for path in folder.glob(".*")) == sorted(kept)


def test_one_attempt_may_give_up_the_same_step_twice(folder: Path, attempt: Attempt) -> None:
    for _ in range(2):
        found, aside = _valid(folder, attempt, abandoned=lambda manifest: manifest.step > 4)
        assert (_step(found), [each.step for each in aside]) == (4, [6])
        save_checkpoint(folder, _state(6), 6, attempt=2)
    assert sorted(path.name for path in folder.glob(".*")) == [".rolled-back-a2-step-00000006"]


def test_a_damaged_one_of_a_line_that_was_given_up_is_damage(folder: Path, attempt: Attempt) -> None:
    _flip(folder / "step-00000006")
    _, aside = _valid(folder, attempt, abandoned=lambda manifest: manifest.step > 4)
    assert [each.path.name for each in aside] == [".corrupt-a2-step-00000006"]
