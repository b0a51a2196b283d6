"""Sequences to rows of tokens and labels: the shift, where documents begin, and which labels are predicted.

A sequence is S + 1 tokens and its *bounds* [D + 1]: document d is tokens `bounds[d]:bounds[d + 1]`, and the tokens past
the last bound are padding (flash-attention calls the same numbers `cu_seqlens`). A sequence may begin in the middle of
a document; its first bound is 0 all the same.

Legend: B rows, S tokens of a sequence, D documents of a sequence.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadistill.types import IGNORED_LABEL

Bounds = NDArray[np.integer[Any]]


def shift(sequences: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The inputs [..., S] and the labels [..., S] of sequences [..., S + 1]."""
    return sequences[..., :-1], sequences[..., 1:]


def document_starts(bounds: Sequence[Bounds], *, sequence_length: int) -> NDArray[np.bool_]:
    """[B, S]: True where a document, or the padding, begins. `bounds` is one array a row; position 0 always begins."""
    starts_BS = _marks(bounds, sequence_length)[:, :-1].copy()
    starts_BS[:, 0] = True
    return starts_BS


def predicted(bounds: Sequence[Bounds], *, sequence_length: int, across_documents: bool) -> NDArray[np.bool_]:
    """[B, S]: True where a position's label is predicted: never in the padding.

    `across_documents`: the first token of a document is predicted from the last one of the document before.
    """
    places_S = np.arange(1, sequence_length + 1)
    ends_B = np.array([row[-1] for row in bounds], dtype=np.int64)
    inside_BS: NDArray[np.bool_] = places_S < ends_B[:, None]
    return inside_BS if across_documents else inside_BS & ~_marks(bounds, sequence_length)[:, 1:]


def mask_labels(labels_BS: NDArray[np.int64], predicted_BS: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The labels, `IGNORED_LABEL` where nothing is predicted; in place."""
    np.putmask(labels_BS, ~predicted_BS, IGNORED_LABEL)
    return labels_BS


def _marks(bounds: Sequence[Bounds], sequence_length: int) -> NDArray[np.bool_]:
    """[B, S + 1]: True at each bound, but one at the end of the sequence."""
    marks_BT = np.zeros((len(bounds), sequence_length + 2), dtype=np.bool_)
    rows = np.repeat(np.arange(len(bounds)), [len(row) for row in bounds])
    marks_BT[rows, np.concatenate(bounds) if len(bounds) else rows] = True
    return marks_BT[:, :-1]
