"""Snapshots of an accelerator's memory, here of a stand-in, and profiles that cannot be stored."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadistill import timeline
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train.telemetry import profile_capture
from megadistill.train.telemetry.profile_capture import ProfileCapture
from megadistill.train.telemetry.rank_flops import RankFlops
from tests.unit.train.cases import recipe, topology


class Memory:
    """The part of `torch.cuda.memory` that records and writes a history."""

    def __init__(self) -> None:
        self.recording: list[bool] = []

    def _record_memory_history(self, enabled: str | None = "all", max_entries: int = 0) -> None:
        assert enabled is None or max_entries > 0, "an unbounded history fills the host"
        self.recording.append(enabled is not None)

    def _dump_snapshot(self, path: str) -> None:
        Path(path).write_text("recorded" if self.recording[-1:] == [True] else "blocks", encoding="utf-8")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(memory=made))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    return made


def _capture(folder: Path, profile: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> ProfileCapture:
    sections: dict[str, Any] = {"profile": profile} if profile else {}
    made = recipe(Path("manifest.json"), folder, **sections)
    monkeypatch.setattr(RankFlops, "of", lambda *_: RankFlops(30, stage_round=5, loss=10))
    monkeypatch.setattr(profile_capture, "peak_flops", lambda device, precision: 100.0)
    setup: Any = SimpleNamespace(recipe=made, folder=folder)
    return ProfileCapture(setup, topology(world=1))


def _steps(capture: ProfileCapture, numbers: range) -> None:
    shape: Any = None
    for number in numbers:
        capture.before_step(number)
        with timeline.span(timeline.COMPUTE, "student forward"):
            torch.ones(2, 2) @ torch.ones(2, 2)
        capture.after_step(number, StepSeconds(student=2.0, loss=1.0, stage=0.5, rounds=2), shape)


def _end_by(error: Exception, capture: ProfileCapture, numbers: range) -> None:
    with capture:
        _steps(capture, numbers)
        raise error


def test_a_snapshot_has_the_history_of_the_profiled_steps(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _capture(tmp_path, {"steps": [2, 3], "memory_snapshot": True}, monkeypatch) as capture:
        _steps(capture, range(1, 2))
        assert memory.recording == []
        _steps(capture, range(2, 5))
    assert memory.recording == [True, False]
    assert capture._profile is None, "a trace is held no longer than it is written"
    assert (tmp_path / "profile" / "rank-00000-memory.pickle").read_text(encoding="utf-8") == "recorded"
    parts = json.loads((tmp_path / "profile" / "rank-00000-parts.json").read_text(encoding="utf-8"))
    assert parts["steps"] == [2, 3]
    assert {each["part"]: (each["flops"], each["seconds"], each["mfu"]) for each in parts["parts"]} == {
        "student": (40, 4.0, 0.1),
        "loss": (20, 2.0, 0.1),
        "teacher stage": (20, 1.0, 0.2),
    }


@pytest.mark.parametrize("profile", [None, {"steps": [2, 3], "memory_snapshot": True}])
def test_a_rank_out_of_memory_writes_what_held_it(
    tmp_path: Path, memory: Memory, profile: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = _capture(tmp_path, profile, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        _end_by(torch.OutOfMemoryError("tried to allocate 2.00 GiB"), capture, range(1, 3))
    (path,) = (tmp_path / "profile").glob("*")
    assert path.name == "rank-00000-out-of-memory.pickle"
    assert path.read_text(encoding="utf-8") == ("recorded" if profile else "blocks")
    assert memory.recording == ([True, False] if profile else [])


def test_other_faults_and_other_devices_write_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("a fault"), torch.OutOfMemoryError("of a CPU")):
        capture = _capture(tmp_path, {"steps": [1, 2]}, monkeypatch)
        with pytest.raises(type(error)):
            _end_by(error, capture, range(1, 2))
        assert not (tmp_path / "profile").exists()
    assert type(timeline.span(timeline.COMPUTE, "x")).__name__ == "nullcontext", "no range is opened any more"


def test_a_profile_that_cannot_be_stored_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").touch()  # a file where the folder should be
    with caplog.at_level(logging.WARNING), _capture(tmp_path, {"steps": [1, 1]}, monkeypatch) as capture:
        _steps(capture, range(1, 3))
    assert "profile not stored" in caplog.text


def test_only_the_named_ranks_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _capture(tmp_path, {"steps": [1, 2], "ranks": [1]}, monkeypatch) as capture:
        _steps(capture, range(1, 4))
    assert not (tmp_path / "profile").exists()
