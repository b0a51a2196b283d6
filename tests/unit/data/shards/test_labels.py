"""Labels, starts and padding, against the definition written out token by token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megadistill.data.shards.labels import document_starts, mask_labels, predicted, shift
from megadistill.types import IGNORED_LABEL

S = 9
Row = list[int]


@st.composite
def bounds(draw: st.DrawFn) -> Row:
    inner = draw(st.sets(st.integers(1, S + 1), min_size=1))
    return [0, *sorted(inner)]


@given(st.lists(bounds(), min_size=1, max_size=4))
def test_starts_are_the_bounds_before_the_last_token(rows: list[Row]) -> None:
    starts = document_starts([np.array(row) for row in rows], sequence_length=S)
    assert starts.tolist() == [[place in row for place in range(S)] for row in rows]


@given(st.lists(bounds(), min_size=1, max_size=4))
def test_nothing_is_predicted_in_the_padding_nor_of_another_document(rows: list[Row]) -> None:
    arrays = [np.array(row) for row in rows]
    within = predicted(arrays, sequence_length=S, across_documents=False)
    across = predicted(arrays, sequence_length=S, across_documents=True)
    for row, one, other in zip(rows, within.tolist(), across.tolist(), strict=True):
        for place in range(S):
            label = place + 1
            assert other[place] == (label < row[-1])
            assert one[place] == (label < row[-1] and label not in row)


def test_sequences_are_shifted_by_one_and_labels_masked() -> None:
    tokens, labels = shift(np.arange(S + 1))
    assert tokens.tolist() == list(range(S))
    learned = np.array([label % 2 == 0 for label in range(1, S + 1)])
    assert mask_labels(labels.copy(), learned).tolist() == [i if i % 2 == 0 else IGNORED_LABEL for i in range(1, S + 1)]


def test_no_rows_are_no_rows() -> None:
    assert document_starts([], sequence_length=S).shape == (0, S)
    assert predicted([], sequence_length=S, across_documents=False).shape == (0, S)
