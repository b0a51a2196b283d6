"""Room `timeline`: what a timeline is made of: spans of time on the lanes of ranks. It knows no clock and no file.

Times are seconds, on one clock for all lanes, from the begin of the first step on.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["compute", "wait", "send", "data", "save", "host"]
COMPUTE: Kind = "compute"
WAIT: Kind = "wait"
SEND: Kind = "send"
DATA: Kind = "data"
SAVE: Kind = "save"
HOST: Kind = "host"
KINDS: dict[Kind, str] = {
    COMPUTE: "works",
    WAIT: "waits for another rank, and for the wire",
    SEND: "hands something to the wire, and waits until it has left",
    DATA: "waits for the tokens of its batch",
    SAVE: "stands still for a checkpoint",
    HOST: "keeps the books: reports, logs, looks",
}
"""Kind -> what a rank does then."""


class MessageId(NamedTuple):
    """Of the messages from a rank to another, which arrive in order: one to send names it, and one to wait for it."""

    source: int
    to: int
    number: int


class Step(NamedTuple):
    """An optimizer step, from its begin to the next one's."""

    number: int
    begin: float
    end: float


@dataclass(frozen=True)
class Span:
    """What a rank does from `begin` to `end`."""

    kind: Kind
    name: str
    begin: float
    end: float
    depth: int = 0
    """Spans of the same rank that this one lies in."""
    number: int | None = None
    """Of several with one name: the teacher's round."""
    message: MessageId | None = None


@dataclass(frozen=True)
class Lane:
    """What one rank does. Its spans come in the order of their begins, and lie in each other or apart."""

    rank: int
    """Of the launch: the teacher's own ranks are the last."""
    role: str
    node: str
    spans: tuple[Span, ...]
    steps: tuple[Step, ...] = ()
    """None on a rank of the teacher's own."""


@dataclass(frozen=True)
class Timeline:
    """A few steps of a run, or of a plan."""

    title: str
    lanes: tuple[Lane, ...]
    note: str
    """What is to be known of its times, in a line."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """Those of the first rank."""
        return self.lanes[0].steps

    @property
    def window(self) -> tuple[float, float]:
        """From the begin of the first step to the end of the last one, on whichever rank it is latest."""
        steps = [step for lane in self.lanes for step in lane.steps]
        return min(step.begin for step in steps), max(step.end for step in steps)


def first_unnested(spans: Sequence[Span]) -> Span | None:
    """The first of the spans that neither lies in those around it nor behind them; None: all do."""
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
    """Of nested spans, each one's own parts between `begin` and `end`, without what lies in it: nothing overlaps."""
    around: list[Span] = []
    at = begin

    def until(stop: float) -> Iterator[Span]:
        nonlocal at
        stop = min(stop, end)
        if around and at < stop:
            yield _cut(around[-1], at, stop)
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


def _cut(span: Span, begin: float, end: float) -> Span:
    return Span(span.kind, span.name, begin, end, span.depth, span.number, span.message)


def seconds_by_kind(lane: Lane, begin: float, end: float) -> dict[Kind, float]:
    """What a lane spends on each kind between `begin` and `end`; a moment belongs to the innermost span."""
    spent: dict[Kind, float] = defaultdict(float)
    for piece in pieces(lane.spans, begin, end):
        spent[piece.kind] += piece.end - piece.begin
    return dict(spent)
