"""Segments of the stream: spans of slots whose steps have one shape, and the steps that they hold.

A segment is one curriculum entry, or several in a row with the same sequence length, batch, rotary embeddings and loss.
No step lies in two segments: what is left of a segment when slots were skipped, and fills no batch, is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Skips = Sequence[tuple[int, int]]
"""Ranges [start, stop) of slots to leave out, in order, without overlaps."""


@dataclass(frozen=True)
class Segment:
    """Slots [start, stop) of the stream."""

    start: int
    stop: int | None
    """None: without an end; the last segment."""
    sequence_length: int
    """Tokens of a sequence."""
    batch: int | None
    """Sequences of a step; None: those of `train.global_batch`."""
    entry: int
    """Index of its first curriculum entry."""


@dataclass(frozen=True)
class Pace:
    """The steps of a segment, as a run takes them."""

    start: int
    stop: int | None
    batch: int
    """Sequences of a step."""
    tokens: int
    """Tokens of a step."""


def segment_index(starts: Sequence[int], slot: int) -> int:
    """Index of the segment of a slot, for the first slots of all segments."""
    return max(index for index, start in enumerate(starts) if start <= slot)


def paces(segments: Sequence[Segment], batch: int) -> list[Pace]:
    """The steps of each segment; `batch`: sequences of a step in those without their own."""
    sizes = [segment.batch or batch for segment in segments]
    return [
        Pace(segment.start, segment.stop, size, size * segment.sequence_length)
        for segment, size in zip(segments, sizes, strict=True)
    ]


def whole_steps(pace: Pace, slot: int, skips: Skips = ()) -> int | None:
    """Steps from `slot` to the end of a segment, without those that a skip leaves incomplete; None: no end."""
    if pace.stop is None:
        return None
    first = max(slot, pace.start)
    skipped = sum(max(0, min(stop, pace.stop) - max(start, first)) for start, stop in skips)
    return max(0, pace.stop - first - skipped) // pace.batch


def steps_to(paces: Sequence[Pace], tokens: int, *, slot: int = 0, taken: int = 0, skips: Skips = ()) -> int:
    """Steps from `slot` on until the run has read `tokens`, where it has read `taken` of them; the last is whole."""
    steps = 0
    for pace in paces:
        if pace.stop is not None and pace.stop <= slot:
            continue
        needed = max(0, -(-(tokens - taken) // pace.tokens))
        whole = whole_steps(pace, slot, skips)
        if whole is None or needed <= whole:
            return steps + needed
        steps, taken = steps + whole, taken + whole * pace.tokens
    raise AssertionError("the last segment has no end")


def steps_of(paces: Sequence[Pace], steps: int) -> list[int]:
    """Steps in each segment of a run of `steps` steps without skips."""
    shares = []
    for pace in paces:
        whole = whole_steps(pace, 0)
        shares.append(steps if whole is None else min(steps, whole))
        steps -= shares[-1]
    return shares


def slots_after(paces: Sequence[Pace], steps: int) -> int:
    """The first slot after `steps` steps from the beginning, without skips."""
    return sum(share * pace.batch for share, pace in zip(steps_of(paces, steps), paces, strict=True))


def steps_before(paces: Sequence[Pace], slot: int) -> int:
    """Steps that lie below a slot as a whole, without skips."""
    steps = 0
    for pace in paces:
        if pace.stop is None or pace.stop > slot:
            return steps + max(0, slot - pace.start) // pace.batch
        steps += (pace.stop - pace.start) // pace.batch
    raise AssertionError("the last segment has no end")


def tokens_after(paces: Sequence[Pace], steps: int) -> int:
    """Tokens of the first `steps` steps, without skips."""
    return sum(share * pace.tokens for share, pace in zip(steps_of(paces, steps), paces, strict=True))
