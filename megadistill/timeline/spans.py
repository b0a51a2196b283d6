"""The parts of a timeline: spans of time on the lanes of ranks.

Times are seconds, on one clock for all lanes, from the begin of the first step on. The bounds in the annotations are
those of a recording in a file, where times are by the clock of the rank's node.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

Kind = Literal["compute", "wait", "send", "data", "save", "host"]
COMPUTE: Kind = "compute"
WAIT: Kind = "wait"
SEND: Kind = "send"
DATA: Kind = "data"
SAVE: Kind = "save"
HOST: Kind = "host"
KINDS: dict[Kind, str] = {
    COMPUTE: "compute",
    WAIT: "wait for another rank or a message",
    SEND: "send",
    DATA: "wait for the tokens of a batch",
    SAVE: "checkpoint stall",
    HOST: "logging",
}
"""Kind -> its description in the trace."""

Seconds = Annotated[float, Field(ge=0, lt=1e10)]
Name = Annotated[str, Field(min_length=1, max_length=80)]
Number = Annotated[int, Field(ge=0, lt=1 << 53)]


class MessageId(NamedTuple):
    """A message from one rank to another, the same at the span that sends it and the span that waits for it."""

    source: Number
    to: Number
    number: Number
    """Position among the messages from `source` to `to`."""


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step, from its begin to the next one's."""

    number: Number
    begin: Seconds
    end: Seconds


@dataclass(frozen=True, slots=True)
class Span:
    """One activity of a rank, from `begin` to `end`."""

    kind: Kind
    name: Name
    begin: Seconds
    end: Seconds
    depth: Annotated[int, Field(ge=0, le=32)] = 0
    """Number of spans of the same rank around this one."""
    number: Number | None = None
    """Position among the spans with this name: the teacher's round."""
    message: MessageId | None = None


@dataclass(frozen=True)
class Lane:
    """The spans of one rank, in the order of their begins. Two spans are nested or do not overlap."""

    rank: int
    """Rank in the launch: the teacher's own ranks are the last."""
    role: str
    node: str
    spans: tuple[Span, ...]
    steps: tuple[Step, ...] = ()
    """Empty on the teacher's own ranks."""


@dataclass(frozen=True)
class Timeline:
    """A few steps of a run, or of a plan."""

    title: str
    lanes: tuple[Lane, ...]
    note: str
    """One line about its clocks."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the first rank."""
        return self.lanes[0].steps

    @property
    def window(self) -> tuple[float, float]:
        """Begin of the first step and end of the last one, on whichever rank it is latest."""
        steps = [step for lane in self.lanes for step in lane.steps]
        return min(step.begin for step in steps), max(step.end for step in steps)


def first_unnested(spans: Sequence[Span]) -> Span | None:
    """The first span that overlaps another without being nested in it; None where there is none."""
    around: list[Span] = []
    for span in spans:
        while around and around[-1].end <= span.begin and around[-1].depth >= span.depth:
            around.pop()
        if (
            span.begin > span.end
            or len(around) != span.depth
            or (around and not around[-1].begin <= span.begin <= span.end <= around[-1].end)
        ):
            return span
        around.append(span)
    return None


def pieces(spans: Iterable[Span], begin: float, end: float) -> Iterator[Span]:
    """The own parts of nested spans between `begin` and `end`, without the spans inside of them: none overlap."""
    around: list[Span] = []
    at = begin

    def until(stop: float) -> Iterator[Span]:
        nonlocal at
        stop = min(stop, end)
        if around and at < stop:
            yield replace(around[-1], begin=at, end=stop)
        at = max(at, stop)

    for span in spans:
        while around and around[-1].end <= span.begin:
            yield from until(around[-1].end)
            around.pop()
        yield from until(span.begin)
        around.append(span)
    while around:
        yield from until(around[-1].end)
        around.pop()


def seconds_by_kind(lane: Lane, begin: float, end: float) -> dict[Kind, float]:
    """Seconds of each kind on a lane between `begin` and `end`; a moment belongs to the innermost span."""
    seconds: dict[Kind, float] = defaultdict(float)
    for piece in pieces(lane.spans, begin, end):
        seconds[piece.kind] += piece.end - piece.begin
    return dict(seconds)
