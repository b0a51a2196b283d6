"""Units to rows: what is read, which label follows, where documents begin. The one place that says so.

A unit is S + 1 tokens and its *bounds* [D + 1]: document d is tokens `bounds[d]:bounds[d + 1]`, and what lies behind
the last bound is padding (flash-attention calls the same numbers `cu_seqlens`). A unit may begin in the middle of a
document; its first bound is 0 all the same.

Legend: B rows, S tokens of a sequence, D documents of a unit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadistill.types import IGNORED_LABEL

Bounds = NDArray[np.integer[Any]]


def shift(units: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Units [..., S + 1] to the tokens [..., S] that are read and the labels [..., S] that follow them."""
    return units[..., :-1], units[..., 1:]


def document_starts(bounds: Sequence[Bounds], *, sequence_length: int) -> NDArray[np.bool_]:
    """[B, S]: True where a document, or the padding, begins. `bounds` is one array a row; position 0 always begins."""
    starts_BS = _marks(bounds, sequence_length)[:, :-1].copy()
    starts_BS[:, 0] = True
    return starts_BS


def predicted(bounds: Sequence[Bounds], *, sequence_length: int, across_documents: bool) -> NDArray[np.bool_]:
    """[B, S]: True where a position's label is learned: never in the padding, nor of what lies behind a row's end.

    `across_documents`: the last token of a document is asked for the first one of the next.
    """
    places_S = np.arange(1, sequence_length + 1)
    ends_B = np.array([row[-1] for row in bounds], dtype=np.int64)
    inside_BS: NDArray[np.bool_] = places_S < ends_B[:, None]
    return inside_BS if across_documents else inside_BS & ~_marks(bounds, sequence_length)[:, 1:]


def labels_of(labels_BS: NDArray[np.int64], predicted_BS: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The labels, `IGNORED_LABEL` where nothing is predicted; in place."""
    np.putmask(labels_BS, ~predicted_BS, IGNORED_LABEL)
    return labels_BS


def _marks(bounds: Sequence[Bounds], sequence_length: int) -> NDArray[np.bool_]:
    """[B, S + 1]: True at each bound but a last one that lies behind the unit."""
    marks_BU = np.zeros((len(bounds), sequence_length + 2), dtype=np.bool_)
    rows = np.repeat(np.arange(len(bounds)), [len(row) for row in bounds])
    marks_BU[rows, np.concatenate(bounds) if len(bounds) else rows] = True
    return marks_BU[:, :-1]
