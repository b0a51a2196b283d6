"""The recorder of one process: the spans of its main thread, by its host's or its device's clock.

A process has one recorder or none, as with a profiler: the package marks its spans whether they are recorded or not.
Without a recorder, `span` costs a comparison.

On an accelerator a span is the stream's work from one moment to the other (`clock`), and where it stood still for the
host (for tokens, for a checkpoint) it shows as the span of that.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from megadistill.timeline.clock import HostClock
from megadistill.timeline.spans import SEND, WAIT, Kind, MessageId, Span, Step
from megadistill.timeline.stopwatch import UNTIMED, Part, timed

SPANS_BEFORE = 4096
"""Spans that a server keeps while no client records: they cover what is under way when one begins to."""


class Recorder:
    """Records the spans of the thread that makes it, from `start` to `stop`.

    `on_end`: for a server, whose clients decide what to record (`follow`); called when a recording is complete. While
    no client records, the last `SPANS_BEFORE` spans are kept.
    """

    def __init__(self, clock: HostClock, *, on_end: Callable[[], None] | None = None) -> None:
        self.clock = clock
        self.thread = threading.get_ident()
        self.depth = 0
        self._on_end = on_end
        self._moments: deque[tuple[Any, Any, Span]] = deque(maxlen=None if on_end is None else SPANS_BEFORE)
        """Begin and end of each span that has no times yet."""
        self._spans: list[Span] = []
        self._steps: list[Step] = []
        self._step: tuple[int, Any] | None = None
        self.is_requested = False
        """Whether a client records now."""

    def start(self) -> None:
        global _recorder
        assert _recorder is None, "one recorder at a time"
        self.clock.anchor()
        _recorder = self

    def stop(self) -> None:
        global _recorder
        assert _recorder is self
        _recorder = None

    def add(self, begin: Any, end: Any, span: Span) -> None:
        """Records a span whose times are the moments `begin` and `end`."""
        self._moments.append((begin, end, span))

    def step(self, number: int | None) -> None:
        """Ends the current step and begins step `number`, if there is one. Resolves the moments recorded so far."""
        moment = self.clock.moment()
        if self._step is not None:
            previous, since = self._step
            self._steps.append(Step(previous, self.clock.seconds(since), self.clock.seconds(moment)))
            self._resolve()
        self._step = None if number is None else (number, moment)

    def follow(self, is_recorded: bool) -> None:
        """The server begins to work on a request; `is_recorded`: whether the client records the step."""
        if is_recorded == self.is_requested:
            return
        self.is_requested = is_recorded
        if is_recorded:
            self._moments = deque(self._moments)
            self.clock.anchor()
        else:
            self.end()

    def end(self) -> None:
        """Completes the recording of a server, and forgets its spans."""
        assert self._on_end is not None
        self._on_end()
        self.is_requested = False
        self._moments, self._spans = deque(maxlen=SPANS_BEFORE), []

    def recorded(self) -> tuple[tuple[Span, ...], tuple[Step, ...]]:
        """The spans recorded so far, in the order of their begins, and the steps."""
        self._resolve()
        return tuple(sorted(self._spans, key=lambda span: (span.begin, span.depth))), tuple(self._steps)

    def _resolve(self) -> None:
        for begin, end, span in self._moments:
            self._spans.append(replace(span, begin=self.clock.seconds(begin), end=self.clock.seconds(end)))
        self._moments.clear()


_recorder: Recorder | None = None
_annotation: Callable[[str], AbstractContextManager[Any]] | None = None
"""A profiler's range of a name, while one records."""


@contextmanager
def annotated(annotation: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Has every span that begins within the context, on any thread, open a range of its name in a profiler too."""
    global _annotation
    assert _annotation is None, "one profiler at a time"
    _annotation = annotation
    try:
        yield
    finally:
        _annotation = None


class _AnnotatedSpan(AbstractContextManager[None]):
    """A span within a profiler's range."""

    __slots__ = ("_annotation", "_span")

    def __init__(self, annotation: AbstractContextManager[Any], span: AbstractContextManager[None]) -> None:
        self._annotation, self._span = annotation, span

    def __enter__(self) -> None:
        self._annotation.__enter__()
        self._span.__enter__()

    def __exit__(self, *error: object) -> None:
        self._span.__exit__(None, None, None)
        self._annotation.__exit__(None, None, None)


class _OpenSpan(AbstractContextManager[None]):
    """A span that has begun."""

    __slots__ = ("_begin", "_recorder", "_span", "_wait")

    def __init__(self, recorder: Recorder, span: Span, wait: AbstractContextManager[None]) -> None:
        self._recorder, self._span, self._wait = recorder, span, wait

    def __enter__(self) -> None:
        self._wait.__enter__()
        self._recorder.depth += 1
        self._begin = self._recorder.clock.moment()

    def __exit__(self, *_: object) -> None:
        recorder = self._recorder
        end = recorder.clock.moment()
        self._wait.__exit__(None, None, None)
        recorder.depth -= 1
        recorder.add(self._begin, end, replace(self._span, depth=recorder.depth))


def recording() -> bool:
    """Whether this process records a step."""
    return _recorder is not None


def span(
    kind: Kind, name: str, number: int | None = None, *, message: MessageId | None = None
) -> AbstractContextManager[None]:
    """A context whose time is recorded, if this thread has a recorder. It must not be left open over a `yield`.

    Waiting and sending count for the thread's stopwatch, too.
    """
    recorder, annotation = _recorder, _annotation
    opened = timed(Part.WAIT) if kind in (WAIT, SEND) else UNTIMED
    if recorder is not None and recorder.thread == threading.get_ident():
        opened = _OpenSpan(recorder, Span(kind, name, 0.0, 0.0, number=number, message=message), opened)
    return opened if annotation is None else _AnnotatedSpan(annotation(name), opened)


def follow(is_recorded: bool) -> None:
    """For a server: whether the client of the request that it begins to work on records. See `Recorder.follow`."""
    if _recorder is not None:
        _recorder.follow(is_recorded)
