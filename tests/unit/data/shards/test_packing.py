"""Both packers against plain lists: what is predicted, once each, and what is cut, padded and dropped."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.shards import packing
from megadistill.data.shards.labels import predicted
from megadistill.data.shards.packing import Ids, PackedSequence, bestfit, chunk

BOS, EOS, PAD = 1, 2, 0

lengths_of = st.lists(st.integers(0, 40), max_size=12)
frames = st.sampled_from([None, BOS])


def _documents(lengths: list[int]) -> list[Ids]:
    """No two tokens are the same, so that a token says which document it is of and where it stood."""
    ends = np.cumsum([0, *lengths]) + 10
    return [np.arange(ends[i], ends[i + 1], dtype=np.int32) for i in range(len(lengths))]


def _framed(documents: list[Ids], bos: int | None) -> list[list[int]]:
    return [[*([] if bos is None else [bos]), *document.tolist(), EOS] for document in documents]


def _documents_of(sequence: PackedSequence) -> list[list[int]]:
    edges = sequence.bounds.tolist()
    return [sequence.tokens[start:stop].tolist() for start, stop in itertools.pairwise(edges)]


def _check_form(sequences: list[PackedSequence], sequence_length: int) -> None:
    for sequence in sequences:
        assert sequence.tokens.shape == (sequence_length + 1,)
        assert sequence.tokens.dtype == sequence.bounds.dtype == np.int32
        assert sequence.bounds[0] == 0
        assert (np.diff(sequence.bounds) > 0).all()
        assert 1 <= sequence.bounds[-1] <= sequence_length + 1


@given(lengths=lengths_of, sequence_length=st.integers(1, 17), bos=frames)
def test_chunks_are_cuts_of_the_concatenation_that_share_one_token(
    lengths: list[int], sequence_length: int, bos: int | None
) -> None:
    documents = _documents(lengths)
    sequences = list(chunk(iter(documents), sequence_length=sequence_length, bos=bos, eos=EOS))
    tokens = [token for document in _framed(documents, bos) for token in document]
    assert len(sequences) == max(0, len(tokens) - 1) // sequence_length
    _check_form(sequences, sequence_length)
    for k, sequence in enumerate(sequences):
        assert sequence.tokens.tolist() == tokens[k * sequence_length : (k + 1) * sequence_length + 1]
    labels = [token for sequence in sequences for token in sequence.tokens[1:].tolist()]
    assert labels == tokens[1 : len(labels) + 1], "every token but the first is predicted once"


@given(lengths=lengths_of, sequence_length=st.integers(1, 17), bos=frames)
def test_the_bounds_of_a_chunk_are_its_ends_and_where_documents_begin_inside(
    lengths: list[int], sequence_length: int, bos: int | None
) -> None:
    documents = _documents(lengths)
    starts = set(np.cumsum([0, *(len(document) for document in _framed(documents, bos))]).tolist()[:-1])
    for k, sequence in enumerate(chunk(documents, sequence_length=sequence_length, bos=bos, eos=EOS)):
        first = k * sequence_length
        inside = [place for place in range(1, sequence_length + 1) if first + place in starts]
        assert sequence.bounds.tolist() == [0, *inside, sequence_length + 1]


@given(lengths=lengths_of, sequence_length=st.integers(1, 17), bos=frames)
def test_bestfit_predicts_every_token_but_a_documents_first_exactly_once(
    lengths: list[int], sequence_length: int, bos: int | None
) -> None:
    documents = _documents(lengths)
    sequences = list(bestfit(iter(documents), sequence_length=sequence_length, bos=bos, eos=EOS, pad=PAD))
    _check_form(sequences, sequence_length)
    pairs: Counter[tuple[int, int]] = Counter()
    if sequences:
        tokens_BT = np.stack([sequence.tokens for sequence in sequences])
        inside_BS = predicted(
            [sequence.bounds for sequence in sequences], sequence_length=sequence_length, across_documents=False
        )
        pairs.update(zip(tokens_BT[:, :-1][inside_BS].tolist(), tokens_BT[:, 1:][inside_BS].tolist(), strict=True))
        padding = np.arange(sequence_length + 1) >= np.array([sequence.bounds[-1] for sequence in sequences])[:, None]
        assert (tokens_BT[padding] == PAD).all()
    expected = Counter(pair for document in _framed(documents, bos) for pair in itertools.pairwise(document))
    assert pairs == expected


@given(lengths=lengths_of, sequence_length=st.integers(1, 17), bos=frames)
def test_bestfit_cuts_no_document_that_fits(lengths: list[int], sequence_length: int, bos: int | None) -> None:
    documents = _framed(_documents(lengths), bos)
    sequences = bestfit(_documents(lengths), sequence_length=sequence_length, bos=bos, eos=EOS, pad=PAD)
    placed = Counter(tuple(piece) for sequence in sequences for piece in _documents_of(sequence))
    assert all(len(piece) > 1 for piece in placed), "one token alone predicts nothing"
    for document in documents:
        if 1 < len(document) <= sequence_length + 1:
            assert placed[tuple(document)] == documents.count(document)


def test_a_piece_goes_into_the_fullest_sequence_that_it_fits() -> None:
    """Sizes with the end id 7, 6, 4, 3 into sequences of 10: 7 and 3, 6 and 4."""
    documents = [np.full(size - 1, size, dtype=np.int32) for size in (3, 4, 6, 7)]
    sequences = list(bestfit(documents, sequence_length=9, bos=None, eos=EOS, pad=PAD))
    assert [sequence.bounds.tolist() for sequence in sequences] == [[0, 7, 10], [0, 6, 10]]


def test_documents_of_two_groups_are_never_in_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "GROUP", 3)
    documents = [np.full(2, 10 + i, dtype=np.int32) for i in range(7)]
    sequences = list(bestfit(documents, sequence_length=99, bos=None, eos=EOS, pad=PAD))
    assert [set(sequence.tokens.tolist()) - {EOS, PAD} for sequence in sequences] == [{10, 11, 12}, {13, 14, 15}, {16}]


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_padding_is_below_one_percent_on_documents_as_long_as_those_of_the_web(seed: int) -> None:
    """Log-normal, median 600 tokens, a tenth of the documents above 2,800."""
    lengths = np.random.default_rng(seed).lognormal(np.log(600), 1.2, packing.GROUP).astype(int) + 1
    documents = [np.zeros(length, dtype=np.int32) for length in lengths]
    sequences = list(bestfit(documents, sequence_length=2048, bos=None, eos=EOS, pad=PAD))
    held = sum(int(sequence.bounds[-1]) for sequence in sequences)
    assert 1 - held / (len(sequences) * 2049) < 0.01
