"""Requests to stop a run: signals, a file, the clock; a second signal does not wait."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadistill.errors import RestartFault
from megadistill.train.resilience.preemption import (
    REASONS,
    SAME_REQUEST_SECONDS,
    STOP_FILE,
    TIME_LIMIT,
    StopRequests,
    stop_reason,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    yield clock
    monkeypatch.undo()


def _requests(folder: Path, *, first: bool = True, minutes: float | None = None) -> StopRequests:
    return StopRequests(folder, rank=0 if first else 3, first=first, minutes=minutes)


def _reasons(requests: StopRequests) -> list[str]:
    counts = requests.counts()
    assert tuple(counts) == REASONS, "every rank sends the same names in the same order"
    return [reason for reason, count in counts.items() if count == 1.0]


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name
)
@pytest.mark.parametrize("first", [True, False])
def test_each_signal_is_a_request_on_any_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, first: bool
) -> None:
    before = signal.getsignal(number)
    with _requests(tmp_path, first=first) as requests:
        assert _reasons(requests) == []
        os.kill(os.getpid(), number)
        assert _reasons(requests) == [number.name]
        assert _reasons(requests) == [number.name], "until it is acknowledged"
    assert signal.getsignal(number) is before, "the signals are given back"
    stderr = capfd.readouterr().err
    assert stderr.startswith(f"megadistill: rank {0 if first else 3}: {number.name}: stopping after this step")
    assert stderr.count("\n") == 1


def test_signals_of_one_request_are_one_and_a_later_one_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Ctrl-C comes from the terminal and from the launcher; a preemption sends TERM after USR2."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with _requests(tmp_path) as requests:
        os.kill(os.getpid(), signal.SIGUSR2)
        clock.now += SAME_REQUEST_SECONDS
        os.kill(os.getpid(), signal.SIGTERM)
        assert _reasons(requests) == ["SIGUSR2", "SIGTERM"]
        assert left == []
        clock.now += 0.1
        os.kill(os.getpid(), signal.SIGUSR2)
        assert left == [RestartFault.exit_code]


CHILD = """
import os, signal, sys, time
from pathlib import Path
from megadistill.train.resilience import preemption as stop
stop.SAME_REQUEST_SECONDS = -1.0
with stop.StopRequests(Path(sys.argv[1]), rank=5, first=False, minutes=None):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        print("the step continues", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        print("saved", flush=True)
"""


def test_a_second_signal_ends_the_process_in_the_middle_of_what_it_does(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert child.returncode == RestartFault.exit_code, child.stderr
    assert child.stdout == "the step continues\n"
    assert child.stderr.splitlines()[1] == "megadistill: rank 5: second signal (SIGTERM): ending without a checkpoint"


def test_the_file_is_read_by_the_first_rank_and_removed_when_acknowledged(tmp_path: Path) -> None:
    with _requests(tmp_path) as first, _requests(tmp_path, first=False) as other:
        (tmp_path / "STOP").touch()
        assert _reasons(other) == [], "one rank looks, or some would see it a step before others"
        assert _reasons(first) == [STOP_FILE]
        (tmp_path / "STOP").unlink()
        assert _reasons(first) == [STOP_FILE], "a request is not taken back"
        (tmp_path / "STOP").touch()
        other.acknowledge()
        assert (tmp_path / "STOP").exists()
        first.acknowledge()
        assert not (tmp_path / "STOP").exists()
        first.acknowledge()


def test_time_is_up_after_so_many_minutes(tmp_path: Path, clock: Clock) -> None:
    first, other = _requests(tmp_path, minutes=1.5), _requests(tmp_path, first=False, minutes=1.5)
    clock.now += 89.9
    assert _reasons(first) == []
    clock.now += 0.1
    assert _reasons(first) == [TIME_LIMIT]
    assert _reasons(other) == []


def test_the_reason_has_the_requests_of_all_ranks() -> None:
    nothing = dict.fromkeys(REASONS, 0.0)
    assert stop_reason(nothing) is None
    assert stop_reason({**nothing, "SIGTERM": 2.0}) == "SIGTERM"
    assert stop_reason({**nothing, STOP_FILE: 1.0, "SIGUSR1": 1.0, "save_ended": 4.0}) == "SIGUSR1, the file STOP"
