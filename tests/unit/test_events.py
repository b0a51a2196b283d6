"""Lines of a run's own record: none lost, none twice, none half, whatever the disk does; and where its time went."""

import ast
import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megadistill.events import (
    EVENTS,
    EventLog,
    FaultKind,
    Goodput,
    JsonLines,
    goodput,
    json_lines,
    last_step,
    read_events,
)
from tests.paths import ROOT


class Disk:
    """Takes `free` more bytes: the last of them in the middle of a line, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 30
        write, truncate = os.write, os.ftruncate

        def limited(descriptor: int, content: bytes) -> int:
            if self.free == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = write(descriptor, content[: self.free])
            self.free -= written
            return written

        def freeing(descriptor: int, size: int) -> None:
            self.free += os.fstat(descriptor).st_size - size
            truncate(descriptor, size)

        monkeypatch.setattr(os, "write", limited)
        monkeypatch.setattr(os, "ftruncate", freeing)


def _numbers(path: Path) -> list[int]:
    """Every line parsed, so that half a line fails the test."""
    return [json.loads(line)["n"] for line in path.read_bytes().decode().splitlines()]


def test_lines_are_there_when_append_returns(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    for n in range(3):
        assert lines.append({"n": n, "text": "ä\n\u2028"}) is None
        assert list(json_lines(lines.path))[n] == {"n": n, "text": "ä\n\u2028"}
    assert lines.path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("seed", range(5))
def test_a_disk_that_is_full_now_and_then_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    disk, lines, chance = Disk(monkeypatch), JsonLines(tmp_path / "a.jsonl"), random.Random(seed)
    refused = 0
    for n in range(100):
        disk.free = chance.choice([0, 1, 7, 40, 100, 1000])
        why = lines.append({"n": n, "filler": "x" * chance.randrange(30)})
        refused += why is not None
        assert _numbers(lines.path) == list(range(len(_numbers(lines.path)))), "whole lines, in order"
        assert (why is None) == (len(_numbers(lines.path)) == n + 1)
    assert 0 < refused < 100
    disk.free = 1 << 30
    assert lines.append({"n": 100}) is None
    assert _numbers(lines.path) == list(range(101))


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, lines = Disk(monkeypatch), JsonLines(tmp_path / "a.jsonl")
    for free in (0, 5):
        disk.free = free
        assert "No space left" in str(lines.append({"n": 1}))
        assert lines.path.stat().st_size == 0


def test_a_folder_that_is_away_for_a_while_loses_nothing(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "there" / "a.jsonl")
    assert "No such file" in str(lines.append({"n": 0}))
    (tmp_path / "there").mkdir()
    assert lines.append({"n": 1}) is None
    assert _numbers(lines.path) == [0, 1]


@pytest.mark.parametrize("torn", [b'{"n": 7, "te', b"\0\0\0\0", b"\xff"])
def test_what_a_dead_machine_left_of_a_line_costs_that_line_alone(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    JsonLines(path).append({"n": 0})
    with open(path, "ab") as file:
        file.write(torn)
    for n in (1, 2):
        JsonLines(path).append({"n": n})
    assert [line["n"] for line in json_lines(path) if line is not None] == [0, 1, 2]


def test_two_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    """Any rank may write its fault."""
    first, second = JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "a.jsonl")
    for n in range(0, 20, 2):
        first.append({"n": n})
        second.append({"n": n + 1})
    assert _numbers(first.path) == list(range(20))


def test_what_is_no_line_of_a_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n\n3\n[]\nnull\n{"n"\n' + b"[" * 99_999 + b'\n{"n": 2}\n{"n": 3')
    assert [line["n"] for line in json_lines(path) if line is not None] == [1, 2]
    assert list(json_lines(tmp_path / "none")) == []


def test_an_event_says_when_what_and_of_which_attempt(tmp_path: Path) -> None:
    log, other = EventLog(tmp_path, 3, writes=True), EventLog(tmp_path, 3, writes=False)
    kinds: tuple[tuple[EventLog, FaultKind], ...] = ((log, "lost_peer"), (other, "cause"))
    for each, kind in kinds:
        each.write("checkpoint_saved", step=8, bytes=5)
        each.attempt_failed(kind, "it broke", step=9, rank=int(each is other), exit_code=4)
    lines = list(read_events(tmp_path))
    assert [(line["event"], line["step"], line["attempt"]) for line in lines] == [
        ("checkpoint_saved", 8, 3),
        ("attempt_failed", 9, 3),
        ("attempt_failed", 9, 3),
    ]
    assert lines[0]["bytes"] == 5
    assert [line["rank"] for line in lines[1:]] == [0, 1], "one rank writes events, but any rank a fault"
    assert lines[0]["time"] == pytest.approx(lines[2]["time"], abs=60)
    with pytest.raises(AssertionError, match="svaed"):
        log.write("svaed", step=8)


def _names_written(node: ast.AST) -> list[str]:
    """The literal first arguments of `….events.write(…)` and `….warn(…)`, and those of `Anomaly(…)`: one, or one of
    two."""
    names = []
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and call.args:
            called, first = ast.unparse(call.func), call.args[0]
            if called.endswith(("events.write", ".warn")) or called == "Anomaly":
                choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
                names += [str(choice.value) for choice in choices if isinstance(choice, ast.Constant)]
    return names


def test_every_event_that_the_package_writes_has_a_name() -> None:
    """A misspelt one would end a run on the day of its first fault."""
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "megadistill").rglob("*.py")]
    written = [name for source in sources for name in _names_written(source)]
    assert {"attempt_started", "checkpoint_saved", "local_checkpoint_saved", "loss_spike"} <= set(written), (
        "the search finds them"
    )
    assert set(written) <= EVENTS.keys()


def test_every_event_is_documented() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    for event, meaning in EVENTS.items():
        assert f"| `{event}` | {meaning} |\n" in page


def _run(folder: Path, events: list[dict[str, Any]], seconds: list[Any]) -> Goodput:
    for event in events:
        JsonLines(folder / "events.jsonl").append({"attempt": 1, "step": 0, **event})
    for step, taken in enumerate(seconds, start=1):
        JsonLines(folder / "metrics.jsonl").append({"step": step, "seconds": taken})
    return goodput(folder)


def test_goodput_counts_each_step_once_and_each_second_once(tmp_path: Path) -> None:
    """100 s: two starts of 10 and 5, three saves of 1, 20 steps of 3; the rest is what a fault cost."""
    events = [
        {"time": 1000.0, "event": "attempt_started"},
        {"time": 1010.0, "event": "resumed", "startup_seconds": 10.0},
        {"time": 1030.0, "event": "checkpoint_saved", "stall_seconds": 1.0},
        {"time": 1040.0, "event": "attempt_failed"},
        {"time": 1050.0, "event": "attempt_started"},
        {"time": 1055.0, "event": "resumed", "startup_seconds": 5.0},
        {"time": 1070.0, "event": "checkpoint_saved", "stall_seconds": 1.0},
        {"time": 1071.0, "event": "checkpoint_failed", "stall_seconds": 9.0},
        {"time": 1100.0, "event": "checkpoint_saved", "stall_seconds": 1.0},
    ]
    result = _run(tmp_path, events, [3.0] * 20)
    assert (result.wall, result.useful, result.startup, result.saving) == (100.0, 60.0, 15.0, 3.0)
    assert result.lost == pytest.approx(22.0)
    assert result.ratio == pytest.approx(0.6)
    assert str(result) == "goodput 60.0% of 100 s (startup 15.0%, saving 3.0%, repeated 0.0%, lost 22.0%)"


def test_the_time_of_validations_is_a_class_of_its_own(tmp_path: Path) -> None:
    """After the last totals that an event has, and before them; those that were taken again count as well."""
    totals = {"began": 1000.0, "useful": 10.0, "startup": 5.0, "saving": 1.0, "repeated": 0.0, "paused": 0.0}
    events = [
        {"time": 1000.0, "event": "attempt_started"},
        {"time": 1005.0, "event": "resumed", "startup_seconds": 5.0},
        {"time": 1012.0, "event": "validated", "seconds": 7.0},
        {"time": 1030.0, "event": "validated", "seconds": 8.0},
    ]
    folders = [tmp_path / name for name in ("plain", "totals", "earlier")]
    for folder in folders:
        folder.mkdir()
    result = _run(folders[0], events, [2.0] * 5)
    assert (result.validating, result.wall, result.lost) == (15.0, 30.0, 0.0)
    assert "validating 50.0%, repeated 0.0%" in str(result)
    kept = {**totals, "validating": 7.0, "student_diverged": False}
    events.insert(3, {"time": 1020.0, "event": "checkpoint_saved", "stall_seconds": 1.0, "totals": kept})
    assert _run(folders[1], events, [2.0] * 5).validating == 15.0
    del kept["validating"]
    assert _run(folders[2], events, [2.0] * 5).validating == 8.0, "its events had none before"


STOPS = {
    "a signal": {"event": "stopped", "reason": "SIGINT"},
    "--stop-after": {"event": "stopped", "reason": "--stop-after"},
    "a second signal": {"event": "attempt_failed", "requested": True},
    "the last step": {"event": "completed"},
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_the_night_after_a_stop_that_was_requested_is_a_pause(stop: dict[str, Any], tmp_path: Path) -> None:
    """Neither lost nor counted; what comes after the next start is."""
    events = [
        {"time": 1000.0, "event": "attempt_started"},
        {"time": 1010.0, "event": "resumed", "startup_seconds": 10.0, "lost_seconds": 0.0},
        {"time": 1050.0, **stop},
        {"time": 31050.0, "event": "attempt_started"},
        {"time": 31060.0, "event": "resumed", "startup_seconds": 10.0, "lost_seconds": 8.0},
        {"time": 31100.0, "event": "completed"},
    ]
    result = _run(tmp_path, events, [4.0] * 15)
    assert (result.wall, result.paused, result.useful, result.repeated) == (100.0, 30000.0, 60.0, 8.0)
    assert result.lost == pytest.approx(12.0)
    assert str(result) == (
        "goodput 60.0% of 100 s (startup 20.0%, saving 0.0%, repeated 8.0%, lost 12.0%; "
        "paused for 8 h 20 min, not counted)"
    )


@pytest.mark.parametrize("end", [{"event": "attempt_failed"}, {"event": "checkpoint_saved", "stall_seconds": 0.0}])
def test_the_night_after_a_fault_or_a_kill_is_lost(end: dict[str, Any], tmp_path: Path) -> None:
    events = [
        {"time": 0.0, "event": "attempt_started"},
        {"time": 20.0, "event": "stopped"},
        {"time": 50.0, "event": "attempt_started"},
        {"time": 100.0, **end},
        {"time": 1100.0, "event": "attempt_started"},
    ]
    result = _run(tmp_path, events, [])
    assert (result.paused, result.wall, result.lost) == (30.0, 1070.0, 1070.0)


def test_the_end_of_an_attempt_that_was_replaced_long_ago_costs_nothing(tmp_path: Path) -> None:
    events = [
        {"time": 0.0, "event": "attempt_started", "attempt": 1},
        {"time": 50.0, "event": "attempt_started", "attempt": 2},
        {"time": 100.0, "event": "completed", "attempt": 2},
        {"time": 9000.0, "event": "attempt_failed", "attempt": 1},
    ]
    assert _run(tmp_path, events, []).wall == 100.0


def test_the_last_line_of_a_record_is_read_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(tmp_path) is None
    path.write_bytes(b"")
    assert last_step(tmp_path) is None
    for step in range(3):
        JsonLines(path).append({"step": step})
    assert last_step(tmp_path) == 2
    with path.open("ab") as file:
        file.write(b'{"step": "9"}\n{"step": true}\n{"step": 3, "lo')  # not ours, and of a killed process
    assert last_step(tmp_path) == 2


def test_a_run_without_a_record_has_no_goodput(tmp_path: Path) -> None:
    assert goodput(tmp_path) == Goodput()
    assert Goodput().ratio == 0.0
    assert "0.0%" in str(Goodput())


def test_more_step_time_than_wall_time_is_not_lost_time(tmp_path: Path) -> None:
    events = [{"time": 1.0, "event": "attempt_started"}, {"time": 2.0, "event": "completed"}]
    assert _run(tmp_path, events, [3.0, None]).lost == 0.0
