"""Packing documents of any length into sequences of one length.

A document is its ids, framed: the tokenizer's begin id before them where it has one, and always its end id behind them.
With `insert_bos` every sequence, and every document in a sequence, begins with the begin id: one that begins inside a
document gets it put in front. Sequences then share no token: the S labels of a sequence are the tokens behind its BOS.

Legend: S tokens of a sequence, L tokens of a document, D documents of a sequence.
"""

from bisect import bisect_left, insort
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

CHUNK: Final = "chunk"
BESTFIT: Final = "bestfit"
PACKER_VERSIONS: Final = {CHUNK: 2, BESTFIT: 1}
"""Raise one when the same documents and the same `PackerRecord` would give other sequences."""

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


def chunk(
    documents: Iterable[Ids], *, sequence_length: int, bos: int | None, eos: int, insert_bos: bool = False
) -> Iterator[PackedSequence]:
    """Lays documents [L] end to end and cuts the result into sequences.

    Consecutive sequences share one token, sequence k being tokens k·S to k·S + S: the last label of a sequence is the
    first input of the next, so that every token but the very first is predicted exactly once. With `insert_bos` a
    sequence is a BOS and the next S tokens: the BOS of the document that begins there, or one that is put in. The tail
    that fills no sequence is dropped.
    """
    pending: list[Ids] = []
    starts: list[int] = []
    held = 0
    fewest = sequence_length if insert_bos else sequence_length + 1
    for document in framed(documents, bos=bos, eos=eos):
        pending.append(document)
        starts.append(held)
        held += len(document)
        if held < fewest:
            continue
        tokens = np.concatenate(pending)
        edges = np.array(starts, dtype=np.int32)
        if insert_bos:
            assert bos is not None, "there is no BOS to insert"
            left = yield from _sequences_with_bos(tokens, edges, sequence_length, bos=bos)
        else:
            left = yield from _overlapping_sequences(tokens, edges, sequence_length)
        pending, held = [tokens[left:]], held - left
        starts = (edges[edges >= left] - left).tolist()


def _overlapping_sequences(
    tokens: Ids, edges: NDArray[np.int32], sequence_length: int
) -> Generator[PackedSequence, None, int]:
    """Sequences of consecutive `tokens`, in which documents begin at `edges`. Returns how many tokens are used up."""
    used = (len(tokens) - 1) // sequence_length * sequence_length
    for first in range(0, used, sequence_length):
        yield PackedSequence(tokens[first : first + sequence_length + 1], _bounds(edges, first, sequence_length + 1))
    return used


def _sequences_with_bos(
    tokens: Ids, edges: NDArray[np.int32], sequence_length: int, *, bos: int
) -> Generator[PackedSequence, None, int]:
    """The same with `bos`, the first token of each document, in front of every sequence."""
    first, begins = 0, set(edges.tolist())
    while (after_bos := first + (first in begins)) + sequence_length <= len(tokens):
        sequence = np.append(np.int32(bos), tokens[after_bos : after_bos + sequence_length])
        yield PackedSequence(sequence, _bounds(edges, after_bos - 1, sequence_length + 1))
        first = after_bos + sequence_length
    return first


def _bounds(edges: NDArray[np.int32], first: int, length: int) -> NDArray[np.int32]:
    """[D + 1]: the documents that begin inside `length` tokens from `first`, between the sequence's own two ends."""
    inside = edges[bisect_left(edges, first + 1) : bisect_left(edges, first + length)] - first
    return np.concatenate(([0], inside, [length])).astype(np.int32)


def bestfit(
    documents: Iterable[Ids],
    *,
    sequence_length: int,
    bos: int | None,
    eos: int,
    pad: int,
    insert_bos: bool = False,
) -> Iterator[PackedSequence]:
    """Packs whole documents [L] into sequences, padded with `pad` (best-fit decreasing, arXiv 2404.10830).

    A document that fits is never cut. A longer one is cut as `chunk` does it, into pieces that share one token, or with
    `insert_bos` into pieces that begin with BOS. So each token of a document but its first is predicted exactly once,
    inside its own document; one token alone, which predicts nothing, is left out.
    """
    capacity = sequence_length + 1
    rest = framed(documents, bos=bos, eos=eos)
    while group := list(islice(rest, GROUP)):
        pieces = [piece for document in group for piece in _pieces(document, sequence_length, insert_bos=insert_bos)]
        for bin in _bins([len(piece) for piece in pieces], capacity):
            yield _padded([pieces[number] for number in bin], capacity, pad)


def _pieces(document: Ids, sequence_length: int, *, insert_bos: bool) -> Iterator[Ids]:
    """A framed document in pieces of S + 1 tokens at most, which share one token, or begin with the document's BOS."""
    for start in range(0, len(document) - 1, sequence_length):
        piece = document[start : start + sequence_length + 1]
        if insert_bos and start:
            piece = np.concatenate((document[:1], piece[1:]))
        yield piece


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
