"""Room `timeline`: the recorder of one process: what its main thread does, by its host's or its device's clock.

There is one a process, or none, as with a profiler: the rooms say what they do, whether somebody records it or not.
Nothing recorded, `span` costs a comparison. It knows no files.

On an accelerator the host only queues work, so its clock tells nothing of when the work is done. There a moment is an
event in the device's stream, and becomes a time once the device has passed it: a span is what the stream did from one
to the other, and where it stood still for the host (for tokens, for a checkpoint) it shows as the span of that.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch

from megadistill.timeline.spans import Kind, MessageId, Span, Step

BEFORE = 4096
"""Spans that a rank which serves others keeps while nobody asks for them: what was under way when somebody does."""

_NOTHING: AbstractContextManager[None] = nullcontext()


class Clock(Protocol):
    """Moments, and the times that they become: seconds of the host's monotonic clock, which its processes share."""

    def moment(self) -> Any: ...

    def seconds(self, moment: Any) -> float:
        """Waits for the device to have passed the moment."""
        ...

    def anchor(self) -> None:
        """Compares the device's clock with the host's: the nearer to the moments, the better."""
        ...


class HostClock:
    """Where the host does the work itself."""

    def moment(self) -> float:
        return time.monotonic()

    def seconds(self, moment: float) -> float:
        return moment

    def anchor(self) -> None:
        """There is nothing to compare."""


class DeviceClock:
    """Events in the current stream of an accelerator. They count milliseconds in float32: 0.1 ms of half an hour."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.anchor()

    def moment(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: torch.Event) -> float:
        moment.synchronize()
        return self._since + float(self._anchor.elapsed_time(moment)) / 1000

    def anchor(self) -> None:
        torch.accelerator.synchronize(self._device)
        self._anchor = self.moment()
        self._anchor.synchronize()
        self._since = time.monotonic()


def clock_of(device: torch.device) -> Clock:
    """The one switch between a CPU and what only an accelerator can do."""
    return HostClock() if device.type == "cpu" else DeviceClock(device)


class Recorder:
    """Takes down the spans of the thread that makes it, once `start`ed, until it is stopped.

    `on_end`: for a rank that serves others, and is told by their requests (`follow`) what to record: called when what
    was asked for is recorded. Until it is asked for, the last `BEFORE` spans are kept.
    """

    def __init__(self, clock: Clock, *, on_end: Callable[[], None] | None = None) -> None:
        self.clock = clock
        self.thread = threading.get_ident()
        self.depth = 0
        self._on_end = on_end
        self._taken: deque[tuple[Kind, str, Any, Any, int, int | None, MessageId | None]]
        self._taken = deque(maxlen=None if on_end is None else BEFORE)
        self._spans: list[Span] = []
        self._steps: list[Step] = []
        self._step: tuple[int, Any] | None = None
        self.asked = False
        """Whether `follow` was told to record."""

    def start(self) -> None:
        global _recorder
        assert _recorder is None, "one recorder at a time"
        _recorder = self

    def stop(self) -> None:
        global _recorder
        assert _recorder is self
        _recorder = None

    def take(
        self, kind: Kind, name: str, begin: Any, end: Any, depth: int, number: int | None, message: MessageId | None
    ) -> None:
        self._taken.append((kind, name, begin, end, depth, number, message))

    def step(self, number: int | None) -> None:
        """A step ends here, and `number` begins; None: none does. What has happened so far becomes times."""
        moment = self.clock.moment()
        if self._step is not None:
            begun, since = self._step
            self._steps.append(Step(begun, self.clock.seconds(since), self.clock.seconds(moment)))
            self._settle()
        self._step = None if number is None else (number, moment)

    def follow(self, asked: bool) -> None:
        """A request begins to be served that came from a rank which records, or does not."""
        if asked == self.asked:
            return
        self.asked = asked
        if asked:
            self._taken = deque(self._taken)
            self.clock.anchor()
        else:
            self.end()

    def end(self) -> None:
        """What was asked for is recorded, and is forgotten here."""
        assert self._on_end is not None
        self._on_end()
        self.asked = False
        self._taken, self._spans = deque(maxlen=BEFORE), []

    def recorded(self) -> tuple[tuple[Span, ...], tuple[Step, ...]]:
        """What has been taken down so far, in the order of the begins."""
        self._settle()
        return tuple(sorted(self._spans, key=lambda span: (span.begin, span.depth))), tuple(self._steps)

    def _settle(self) -> None:
        for kind, name, begin, end, depth, number, message in self._taken:
            times = self.clock.seconds(begin), self.clock.seconds(end)
            self._spans.append(Span(kind, name, *times, depth, number, message))
        self._taken.clear()


_recorder: Recorder | None = None


class _Open:
    """A span that has begun."""

    __slots__ = ("_begin", "_kind", "_message", "_name", "_number", "_recorder")

    def __init__(
        self, recorder: Recorder, kind: Kind, name: str, number: int | None, message: MessageId | None
    ) -> None:
        self._recorder, self._kind, self._name, self._number, self._message = recorder, kind, name, number, message

    def __enter__(self) -> None:
        self._recorder.depth += 1
        self._begin = self._recorder.clock.moment()

    def __exit__(self, *_: object) -> None:
        recorder = self._recorder
        end = recorder.clock.moment()
        recorder.depth -= 1
        recorder.take(self._kind, self._name, self._begin, end, recorder.depth, self._number, self._message)


def recording() -> bool:
    """Whether this process records a step."""
    return _recorder is not None


def span(kind: Kind, name: str, number: int | None = None) -> AbstractContextManager[None]:
    """To be recorded, if somebody records: what happens inside. It must not be left open over a `yield`."""
    recorder = _recorder
    if recorder is None or recorder.thread != threading.get_ident():
        return _NOTHING
    return cast(AbstractContextManager[None], _Open(recorder, kind, name, number, None))


def message_span(kind: Kind, verb: str, what: str, source: int, to: int, number: int) -> AbstractContextManager[None]:
    """A `span` in which message `number` from rank `source` to rank `to` is handed to the wire, or waited for."""
    recorder = _recorder
    if recorder is None or recorder.thread != threading.get_ident():
        return _NOTHING
    message = MessageId(source, to, number)
    return cast(AbstractContextManager[None], _Open(recorder, kind, f"{verb} {what}", None, message))


def follow(asked: bool) -> None:
    """For a rank that serves others: whether the one whose request it now serves records. See `Recorder.follow`."""
    if _recorder is not None:
        _recorder.follow(asked)
