"""Chunk packing against a plain concatenation."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megadistill.data.packing import chunk

EOS = 2

documents_of = st.lists(st.lists(st.integers(3, 99), max_size=40), max_size=12)


@given(documents=documents_of, sequence_length=st.integers(1, 17))
def test_units_are_cuts_of_the_concatenation_that_share_one_token(
    documents: list[list[int]], sequence_length: int
) -> None:
    units = list(chunk((np.array(d, dtype=np.int32) for d in documents), sequence_length=sequence_length, eos=EOS))
    tokens = [token for document in documents for token in [*document, EOS]]
    assert len(units) == max(0, len(tokens) - 1) // sequence_length
    for k, unit in enumerate(units):
        assert unit.tolist() == tokens[k * sequence_length : (k + 1) * sequence_length + 1]
    labels = [token for unit in units for token in unit[1:].tolist()]
    assert labels == tokens[1 : len(labels) + 1], "every token but the first is predicted once"
