"""Room `train`: what may ask a run to stop. It saves nothing: the asking rides on the step's own reduction.

SIGUSR1, SIGUSR2 (the notice of a batch system), SIGTERM and SIGINT, to any rank; the file STOP in the run folder, and a
time budget, which the first rank looks at. The ranks count together who was asked, so all of them stop after the same
step. A second signal leaves at once, without a checkpoint.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megadistill.errors import RestartFault

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
STOP_FILE, TIME_BUDGET = "the file STOP", "run.minutes"
REASONS = (*(each.name for each in SIGNALS), STOP_FILE, TIME_BUDGET)

ONE_NOTICE_SECONDS = 2.0
"""Signals closer than this are one notice: Ctrl-C reaches a rank from the terminal, and again from its launcher."""


class StopRequests:
    """What has asked this rank to stop so far. A context: the signals are its own from `with` to the end of it."""

    def __init__(self, folder: Path, *, rank: int, first: bool, minutes: float | None) -> None:
        self._file = folder / "STOP"
        self._rank = rank
        self._first = first
        self._ends = None if minutes is None else time.monotonic() + 60 * minutes
        self._asked: set[str] = set()
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
        """By `REASONS`: 1 for what has asked this rank. Looks at the clock, and for the file."""
        if self._first:
            if self._file.exists():
                self._asked.add(STOP_FILE)
            if self._ends is not None and time.monotonic() >= self._ends:
                self._asked.add(TIME_BUDGET)
        return {reason: float(reason in self._asked) for reason in REASONS}

    def obeyed(self) -> None:
        """The run has stopped: the file has been obeyed, and must not stop the next attempt."""
        if self._first:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._since is not None and now - self._since > ONE_NOTICE_SECONDS:
            self._say(f"a second signal ({name}): leaving without a checkpoint")
            os._exit(RestartFault.exit_code)
        if self._since is None:
            self._since = now
            self._say(f"{name}: stopping after this step with a checkpoint; a second signal leaves without one")
        self._asked.add(name)

    def _say(self, line: str) -> None:
        with suppress(OSError):  # whoever read it is gone
            os.write(2, f"megadistill: rank {self._rank}: {line}\n".encode())  # print is not safe in a handler


@contextmanager
def deaf(rank: int) -> Iterator[None]:
    """For a rank of the teacher's own, which the student's ranks need for the step at hand: they stop the run."""

    def say(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        line = f"megadistill: rank {rank} of the teacher: {name}: the student's ranks stop the run when they get it\n"
        with suppress(OSError):
            os.write(2, line.encode())

    before = {each: signal.signal(each, say) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def asked(counts: dict[str, float]) -> str | None:
    """What has asked any rank to stop, from the counts summed over ranks; None: nothing."""
    return ", ".join(reason for reason in REASONS if counts[reason] > 0) or None
