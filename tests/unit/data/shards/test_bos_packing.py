"""Packing with BOS in front of every sequence: each token is predicted once, and no BOS is doubled."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from megadistill.data.shards.labels import predicted
from megadistill.data.shards.packing import PackedSequence, bestfit, chunk
from tests.unit.data.reference_packing import (
    BOS,
    EOS,
    PAD,
    as_lists,
    distinct_documents,
    framed_lists,
    sequences_with_bos,
    stream_of,
)

lengths_of = st.lists(st.integers(0, 40), max_size=12)
sequence_lengths = st.integers(1, 17)


def _chunks(lengths: list[int], sequence_length: int) -> list[PackedSequence]:
    documents = iter(distinct_documents(lengths))
    return list(chunk(documents, sequence_length=sequence_length, bos=BOS, eos=EOS, insert_bos=True))


def _labels(sequences: list[PackedSequence], *, across_documents: bool) -> list[int]:
    labels: list[int] = []
    for sequence in sequences:
        rows = predicted([sequence.bounds], sequence_length=len(sequence.tokens) - 1, across_documents=across_documents)
        labels += sequence.tokens[1:][rows[0]].tolist()
    return labels


@given(lengths=lengths_of, sequence_length=sequence_lengths)
@example(lengths=[4, 4, 4], sequence_length=5)  # each sequence is a document
@example(lengths=[5, 4], sequence_length=6)  # a sequence ends where a document does
@example(lengths=[8], sequence_length=9)  # one sequence, nothing left
@example(lengths=[8, 9], sequence_length=1)
def test_chunks_are_those_of_the_reference(lengths: list[int], sequence_length: int) -> None:
    expected = sequences_with_bos(*stream_of(distinct_documents(lengths), BOS), sequence_length)
    assert as_lists(_chunks(lengths, sequence_length)) == expected


@given(lengths=lengths_of, sequence_length=sequence_lengths)
def test_the_labels_are_the_tokens_of_the_documents_once_each_in_order(
    lengths: list[int], sequence_length: int
) -> None:
    """But for the rest that fills no sequence; a document's BOS is a label where it is not in front of a sequence."""
    sequences = _chunks(lengths, sequence_length)
    tokens, _ = stream_of(distinct_documents(lengths), BOS)
    labels = _labels(sequences, across_documents=True)
    assert len(labels) == len(sequences) * sequence_length, "no label is lost"
    written = [label for label in labels if label != BOS]
    content = [token for token in tokens if token != BOS]
    assert written == content[: len(written)]
    assert len(content) - len(written) <= sequence_length


@given(lengths=lengths_of, sequence_length=sequence_lengths)
def test_every_sequence_begins_with_bos_and_none_with_two(lengths: list[int], sequence_length: int) -> None:
    for sequence in _chunks(lengths, sequence_length):
        tokens = sequence.tokens.tolist()
        assert tokens[0] == BOS
        assert (BOS, BOS) not in itertools.pairwise(tokens)
        assert [tokens[place] for place in sequence.bounds[:-1]] == [BOS] * (len(sequence.bounds) - 1)
        assert sequence.tokens.dtype == sequence.bounds.dtype == np.int32


@given(lengths=lengths_of, sequence_length=sequence_lengths)
def test_bestfit_predicts_every_token_once_inside_its_document_and_each_piece_begins_with_bos(
    lengths: list[int], sequence_length: int
) -> None:
    documents = distinct_documents(lengths)
    sequences = list(
        bestfit(iter(documents), sequence_length=sequence_length, bos=BOS, eos=EOS, pad=PAD, insert_bos=True)
    )
    for sequence in sequences:
        pieces = [sequence.tokens[start:stop].tolist() for start, stop in itertools.pairwise(sequence.bounds.tolist())]
        for piece in pieces:
            assert piece[0] == BOS
            assert BOS not in piece[1:]
            assert len(piece) > 1, "one token alone predicts nothing"
        assert (sequence.tokens[sequence.bounds[-1] :] == PAD).all()
    expected = Counter(token for document in framed_lists(documents, BOS) for token in document[1:])
    assert Counter(_labels(sequences, across_documents=False)) == expected


@given(lengths=lengths_of, sequence_length=sequence_lengths)
def test_bestfit_cuts_a_long_document_into_pieces_of_as_much_content_as_fits(
    lengths: list[int], sequence_length: int
) -> None:
    documents = distinct_documents(lengths)
    sequences = bestfit(iter(documents), sequence_length=sequence_length, bos=BOS, eos=EOS, pad=PAD, insert_bos=True)
    placed = Counter(
        tuple(sequence.tokens[start:stop].tolist())
        for sequence in sequences
        for start, stop in itertools.pairwise(sequence.bounds.tolist())
    )
    expected: Counter[tuple[int, ...]] = Counter()
    for document in framed_lists(documents, BOS):
        content = document[1:]
        expected.update(
            (BOS, *content[start : start + sequence_length]) for start in range(0, len(content), sequence_length)
        )
    assert placed == expected
