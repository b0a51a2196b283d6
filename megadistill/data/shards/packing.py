"""Packing documents of any length into sequences of one length.

A document is its ids, framed: the tokenizer's begin id before them where it has one, and always its end id behind them.

Legend: S tokens of a sequence, L tokens of a document, D documents of a sequence.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

CHUNK: Final = "chunk"
BESTFIT: Final = "bestfit"
PACKER_VERSIONS: Final = {CHUNK: 2, BESTFIT: 1}
"""Raise one when the same documents would give other sequences."""

GROUP: Final = 4000
"""Documents that `bestfit` sorts at a time."""

_NUMBER_BITS = 32

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class PackedSequence:
    """A sequence as a shard stores it: tokens [S + 1], and bounds [D + 1] (see `labels`)."""

    tokens: Ids
    bounds: NDArray[np.int32]


def framed(documents: Iterable[Ids], *, bos: int | None, eos: int) -> Iterator[Ids]:
    """Documents [L] with `bos` before and `eos` behind."""
    begin = np.array([] if bos is None else [bos], dtype=np.int32)
    end = np.array([eos], dtype=np.int32)
    for document in documents:
        yield np.concatenate((begin, document, end))


def chunk(documents: Iterable[Ids], *, sequence_length: int, bos: int | None, eos: int) -> Iterator[PackedSequence]:
    """Lays documents [L] end to end and cuts the result into sequences.

    Consecutive sequences share one token, sequence k being tokens k·S to k·S + S: the last label of a sequence is the
    first input of the next, so that every token but the very first is predicted exactly once. The tail that fills no
    sequence is dropped.
    """
    pending: list[Ids] = []
    starts: list[int] = []
    held = 0
    for document in framed(documents, bos=bos, eos=eos):
        pending.append(document)
        starts.append(held)
        held += len(document)
        whole = (held - 1) // sequence_length
        if whole == 0:
            continue
        tokens = np.concatenate(pending)
        edges = np.array(starts, dtype=np.int32)
        for first in range(0, whole * sequence_length, sequence_length):
            yield PackedSequence(
                tokens[first : first + sequence_length + 1], _bounds(edges, first, sequence_length + 1)
            )
        left = whole * sequence_length
        pending, held = [tokens[left:]], held - left
        starts = (edges[edges >= left] - left).tolist()


def _bounds(edges: NDArray[np.int32], first: int, length: int) -> NDArray[np.int32]:
    """[D + 1]: the documents that begin inside `length` tokens from `first`, between the sequence's own two ends."""
    inside = edges[bisect_left(edges, first + 1) : bisect_left(edges, first + length)] - first
    return np.concatenate(([0], inside, [length])).astype(np.int32)


def bestfit(
    documents: Iterable[Ids], *, sequence_length: int, bos: int | None, eos: int, pad: int
) -> Iterator[PackedSequence]:
    """Packs whole documents [L] into sequences, padded with `pad` (best-fit decreasing, arXiv 2404.10830).

    A document that fits is never cut. A longer one is cut as `chunk` does it, into pieces that share one token. So each
    token of a document but its first is predicted exactly once, inside its own document; one token alone, which
    predicts nothing, is left out.
    """
    capacity = sequence_length + 1
    rest = framed(documents, bos=bos, eos=eos)
    while group := list(islice(rest, GROUP)):
        pieces = [
            document[start : start + capacity]
            for document in group
            for start in range(0, len(document) - 1, sequence_length)
        ]
        for bin in _bins([len(piece) for piece in pieces], capacity):
            yield _padded([pieces[number] for number in bin], capacity, pad)


def _bins(sizes: list[int], capacity: int) -> list[list[int]]:
    """The pieces of each bin: longest first, each into the fullest bin that it fits, the oldest among equals."""
    bins: list[list[int]] = []
    free: list[int] = []  # sorted; the free tokens of a bin in the high bits, its number in the low ones
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        at = bisect_left(free, size << _NUMBER_BITS)
        if at == len(free):
            bin = capacity << _NUMBER_BITS | len(bins)
            bins.append([])
        else:
            bin = free.pop(at)
        bins[bin & ((1 << _NUMBER_BITS) - 1)].append(number)
        left = bin - (size << _NUMBER_BITS)
        if left >> _NUMBER_BITS > 1:  # nothing of one token is ever packed
            insort(free, left)
    return bins


def _padded(pieces: list[Ids], capacity: int, pad: int) -> PackedSequence:
    bounds = np.zeros(len(pieces) + 1, dtype=np.int32)
    np.cumsum([len(piece) for piece in pieces], out=bounds[1:])
    tokens = np.full(capacity, pad, dtype=np.int32)
    np.concatenate(pieces, out=tokens[: bounds[-1]])
    return PackedSequence(tokens, bounds)
