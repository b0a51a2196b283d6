"""The time of each part of a step, on every step: what `metrics.jsonl` has of it.

A stopwatch takes moments of the device's clock (`clock`) where a part begins and ends, and waits for nothing. They are
read once, behind the step's own wait for the device, so that timing adds none. A host's clock would be wrong on an
accelerator: a part that reads a number from the device would be charged with all work that is queued before it.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megadistill.timeline.clock import HostClock


class Part(Enum):
    """A part of a step."""

    STUDENT = "student"
    LOSS = "loss"
    TEACHER = "teacher"
    STAGE = "stage"
    """Within `TEACHER`."""
    WAIT = "wait"
    """Within `TEACHER`."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step's parts on this rank."""

    student: float = 0.0
    """The student's forward and backward pass and its optimizer."""
    loss: float = 0.0
    """The loss, with the products of both heads and the exchange in the vocab group."""
    teacher: float = 0.0
    """The time from asking for a micro-batch's targets to having them."""
    wait: float = 0.0
    """The part of `teacher` that waits for other ranks, and for what they send."""
    stage: float = 0.0
    """The part of `teacher` that a stage of the teacher on this rank works, without any wait."""
    rounds: int = 0
    """Number of times that the stage worked, each time on one micro-batch of each rank of its pipeline."""


_current = threading.local()
UNTIMED: AbstractContextManager[None] = nullcontext()
"""The context where nothing is timed."""


class Stopwatch(AbstractContextManager["Stopwatch"]):
    """Times the parts of a step that this thread enters within the context."""

    def __init__(self, clock: HostClock) -> None:
        self.clock = clock
        self.open: list[Part] = []
        """Parts under way, the outermost first."""
        self._moments: list[tuple[Part, Any, Any]] = []

    def __enter__(self) -> "Stopwatch":
        assert _stopwatch() is None, "one stopwatch at a time"
        _current.stopwatch = self
        return self

    def __exit__(self, *_: object) -> None:
        _current.stopwatch = None

    def add(self, part: Part, begin: Any, end: Any) -> None:
        self._moments.append((part, begin, end))

    def read(self) -> StepSeconds:
        """The sums so far. Call it where the device has just been waited for."""
        sums = dict.fromkeys(Part, 0.0)
        for part, begin, end in self._moments:
            sums[part] += self.clock.between(begin, end)
        rounds = sum(part is Part.STAGE for part, _, _ in self._moments)
        return StepSeconds(**{part.value: seconds for part, seconds in sums.items()}, rounds=rounds)


class _Timed(AbstractContextManager[None]):
    """A part that has begun."""

    __slots__ = ("_begin", "_part", "_stopwatch")

    def __init__(self, stopwatch: Stopwatch, part: Part) -> None:
        self._stopwatch, self._part = stopwatch, part

    def __enter__(self) -> None:
        self._stopwatch.open.append(self._part)
        self._begin = self._stopwatch.clock.moment()

    def __exit__(self, *_: object) -> None:
        self._stopwatch.add(self._part, self._begin, self._stopwatch.clock.moment())
        self._stopwatch.open.pop()


def timed(part: Part) -> AbstractContextManager[None]:
    """A context whose time counts for a part of the step, if this thread has a stopwatch.

    It must not be left open over a `yield`. A wait counts within `Part.TEACHER`, and the outermost one of nested ones.
    """
    stopwatch = _stopwatch()
    if stopwatch is None:
        return UNTIMED
    if part is Part.WAIT and (Part.TEACHER not in stopwatch.open or Part.WAIT in stopwatch.open):
        return UNTIMED
    return _Timed(stopwatch, part)


def _stopwatch() -> Stopwatch | None:
    return getattr(_current, "stopwatch", None)
