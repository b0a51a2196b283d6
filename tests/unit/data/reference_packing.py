"""Packing with BOS in front of every sequence, token by token: slow, and obviously what it says it does."""

from collections.abc import Sequence

import numpy as np

from megadistill.data.shards.packing import Ids, PackedSequence

BOS, EOS, PAD = 1, 2, 0


def distinct_documents(lengths: Sequence[int]) -> list[Ids]:
    """No two tokens are the same, so that a token says which document it is of and where it stood."""
    ends = np.cumsum([0, *lengths]) + 10
    return [np.arange(ends[i], ends[i + 1], dtype=np.int32) for i in range(len(lengths))]


def framed_lists(documents: Sequence[Ids], bos: int | None) -> list[list[int]]:
    return [[*([] if bos is None else [bos]), *document.tolist(), EOS] for document in documents]


def sequences_with_bos(tokens: Sequence[int], starts: Sequence[bool], length: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, bounds) of each sequence of `length` + 1 tokens of a stream; `starts`: where a document begins.

    A sequence begins with the BOS of the document that begins there, or else with one that is put in.
    """
    sequences, place = [], 0
    while place < len(tokens):
        sequence, bounds = [BOS], [0]
        if starts[place]:
            assert tokens[place] == BOS
            place += 1
        while len(sequence) <= length and place < len(tokens):
            if starts[place]:
                bounds.append(len(sequence))
            sequence.append(tokens[place])
            place += 1
        if len(sequence) == length + 1:
            sequences.append((sequence, [*bounds, length + 1]))
    return sequences


def stream_of(documents: Sequence[Ids], bos: int | None) -> tuple[list[int], list[bool]]:
    """All tokens of the framed documents, and where each document begins."""
    framed = framed_lists(documents, bos)
    return [t for document in framed for t in document], [place == 0 for doc in framed for place in range(len(doc))]


def as_lists(sequences: Sequence[PackedSequence]) -> list[tuple[list[int], list[int]]]:
    return [(sequence.tokens.tolist(), sequence.bounds.tolist()) for sequence in sequences]
