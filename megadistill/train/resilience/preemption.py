"""Requests to stop a run: signals, the file STOP, a time limit.

SIGUSR1, SIGUSR2 (as batch systems send before a preemption), SIGTERM and SIGINT to any rank; the file STOP in the run
folder and the time limit, which the first rank checks. The requests of all ranks are summed in each step's reduction,
so all ranks stop after the same step. A second signal ends the process at once, without a checkpoint.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megadistill.distributed.watchdog.parent import write_stderr
from megadistill.errors import RestartFault

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
STOP_FILE, TIME_LIMIT = "the file STOP", "run.time_limit_minutes"
REASONS = (*(each.name for each in SIGNALS), STOP_FILE, TIME_LIMIT)

SAME_REQUEST_SECONDS = 2.0
"""Signals closer than this are one request: Ctrl-C reaches a rank from the terminal, and again from its launcher."""


class StopRequests:
    """The requests that this rank has received. A context manager that handles the signals while it is open."""

    def __init__(self, folder: Path, *, rank: int, first: bool, minutes: float | None) -> None:
        self.on_second_signal: Callable[[str], None] | None = None
        """Called with the reason before a second signal ends the process."""
        self._file = folder / "STOP"
        self._rank = rank
        self.first = first
        """Whether this rank looks at the file and the clock."""
        self.somebody_waits: Callable[[], bool] = lambda: False
        """Whether a replica waits to join the run."""
        self._ends = None if minutes is None else time.monotonic() + 60 * minutes
        self._requested: set[str] = set()
        self._since: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        for each in SIGNALS:
            self._before[each] = signal.signal(each, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def counts(self) -> dict[str, float]:
        """1 or 0 for each of `REASONS`, on this rank. Checks the clock and the file."""
        if self.first:
            if self._file.exists():
                self._requested.add(STOP_FILE)
            if self._ends is not None and time.monotonic() >= self._ends:
                self._requested.add(TIME_LIMIT)
        return {reason: float(reason in self._requested) for reason in REASONS}

    def is_requested(self) -> bool:
        """Whether this rank has received a signal."""
        return self._since is not None

    def acknowledge(self) -> None:
        """Removes the file STOP once the run has stopped, so that it does not stop the next attempt."""
        if self.first:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._since is not None and now - self._since > SAME_REQUEST_SECONDS:
            self._write(f"second signal ({name}): ending without a checkpoint")
            with suppress(Exception):  # whatever it is, the process ends now
                if self.on_second_signal is not None:
                    self.on_second_signal(f"second signal ({name})")
            os._exit(RestartFault.exit_code)
        if self._since is None:
            self._since = now
            self._write(f"{name}: stopping after this step with a checkpoint; a second signal ends without one")
        self._requested.add(name)

    def _write(self, line: str) -> None:
        write_stderr(f"rank {self._rank}: {line}")  # not by logging: the interrupted code may hold its lock


@contextmanager
def ignore_stop_signals(rank: int) -> Iterator[None]:
    """Ignores stop signals on a teacher's own rank, which the student's ranks need until they stop the run."""

    def report(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        write_stderr(f"rank {rank} of the teacher: {name} ignored, the student's ranks stop the run")

    before = {each: signal.signal(each, report) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def stop_reason(counts: dict[str, float]) -> str | None:
    """The requests of all ranks, from their summed counts, as in `SIGTERM, run.time_limit_minutes`; None: none."""
    return ", ".join(reason for reason in REASONS if counts[reason] > 0) or None
