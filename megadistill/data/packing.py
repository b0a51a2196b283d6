"""Packing: documents of any length to units of one length. Pure; it knows no files and no tokenizer.

Legend: S tokens of a sequence, L tokens of a document.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

CHUNK: Final = "chunk"
CHUNK_VERSION = 1
"""Raise it when the same documents would give other units."""

Ids = NDArray[np.int32]


def chunk(documents: Iterable[Ids], *, sequence_length: int, eos: int) -> Iterator[Ids]:
    """Concatenates documents [L], each followed by `eos`, and cuts the result into units [S + 1].

    Consecutive units share one token, unit k being tokens k·S to k·S + S: the last label of a unit is the first input
    of the next, so that every token but the very first is predicted exactly once. The tail that fills no unit is
    dropped.
    """
    end = np.array([eos], dtype=np.int32)
    pending: list[Ids] = []
    held = 0
    for document in documents:
        pending += [document, end]
        held += len(document) + 1
        whole = (held - 1) // sequence_length
        if whole == 0:
            continue
        tokens = np.concatenate(pending)
        for start in range(0, whole * sequence_length, sequence_length):
            yield tokens[start : start + sequence_length + 1]
        pending = [tokens[whole * sequence_length :]]
        held = len(pending[0])
