"""BOS put in front of stored sequences when they are read: each token is predicted once, on every rank and resume."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadistill.data.shards.insert_bos import insert_bos
from megadistill.data.shards.labels import predicted
from megadistill.data.shards.manifest import Manifest, PackerRecord
from megadistill.data.shards.packing import PackedSequence, bestfit, chunk
from megadistill.data.shards.sequence_batch import SequenceBatch
from megadistill.data.stream.mixture import Mixture
from megadistill.data.stream.order import CurriculumEntry
from megadistill.data.stream.stream import TokenStream
from megadistill.errors import UserError
from megadistill.types import IGNORED_LABEL, TokenBatch
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
from tests.unit.data.splits import write_split

Packer = Literal["chunk", "bestfit", "external", "generated"]

lengths_of = st.lists(st.integers(0, 40), min_size=1, max_size=12)
sequence_lengths = st.integers(1, 17)
frames = st.sampled_from([None, BOS])


def _record(packer: Packer, *, sequence_bos: bool = False) -> PackerRecord:
    return PackerRecord(name=packer, version=1, bos=BOS, eos=EOS, sequence_bos=sequence_bos)


def _inserted(
    sequences: Sequence[PackedSequence], packer: Packer, *, sequence_bos: bool = False
) -> tuple[list[tuple[list[int], list[int]]], list[list[int]]]:
    """(tokens, bounds) of each sequence, read with BOS put in, and its labels."""
    if not sequences:
        return [], []
    batch = SequenceBatch(
        np.stack([sequence.tokens for sequence in sequences]).astype(np.uint16),
        [sequence.bounds.astype(np.int64) for sequence in sequences],
        {},
    )
    read, elsewhere_N = insert_bos(batch, BOS, _record(packer, sequence_bos=sequence_bos))
    predicted_NS = predicted(
        read.bounds, sequence_length=read.tokens.shape[1] - 1, across_documents=packer != "bestfit"
    )
    predicted_NS[elsewhere_N, -1] = False
    labels = [row[1:][is_label].tolist() for row, is_label in zip(read.tokens, predicted_NS, strict=True)]
    return list(zip(read.tokens.tolist(), [row.tolist() for row in read.bounds], strict=True)), labels


def _chunks(lengths: list[int], length: int, bos: int | None) -> list[PackedSequence]:
    return list(chunk(distinct_documents(lengths), sequence_length=length, bos=bos, eos=EOS))


@given(lengths=lengths_of, length=sequence_lengths, bos=frames)
def test_chunks_predict_each_token_once_in_order(lengths: list[int], length: int, bos: int | None) -> None:
    """But for a BOS in front of a sequence, and the last token, which the sequence after the shard's end would have."""
    sequences = _chunks(lengths, length, bos)
    stream, _ = stream_of(distinct_documents(lengths), bos)
    covered = stream[: len(sequences) * length]
    in_front = {k * length for k in range(len(sequences)) if stream[k * length] == BOS}
    _, labels = _inserted(sequences, "chunk")
    expected = [token for place, token in enumerate(covered) if place not in in_front]
    assert [label for row in labels for label in row] == expected


@given(lengths=lengths_of, length=sequence_lengths, bos=frames)
def test_every_chunk_begins_with_one_bos(lengths: list[int], length: int, bos: int | None) -> None:
    for tokens, bounds in _inserted(_chunks(lengths, length, bos), "chunk")[0]:
        assert tokens[0] == BOS
        assert tokens[1] != BOS
        assert bounds[0] == 0
        assert bounds[-1] == length + 1
        assert bounds == sorted(set(bounds))


@given(lengths=lengths_of, length=sequence_lengths)
def test_reading_chunks_with_bos_is_packing_the_same_stream_with_bos(lengths: list[int], length: int) -> None:
    """Up to the next sequence that begins with a document: from there on, packing is ahead by that document's BOS."""
    sequences = _chunks(lengths, length, BOS)
    stream, starts = stream_of(distinct_documents(lengths), BOS)
    read, _ = _inserted(sequences, "chunk")
    at_an_edge = [k for k in range(len(sequences)) if starts[k * length]] + [len(sequences)]
    for first, end in itertools.pairwise(at_an_edge):
        begin = (first + 1) * length
        packed = sequences_with_bos(stream[begin:], starts[begin:], length)
        assert read[first + 1 : end] == packed[: end - first - 1]


@given(lengths=lengths_of, length=sequence_lengths)
def test_best_fit_sequences_predict_no_token_twice_and_keep_padding_and_bounds(lengths: list[int], length: int) -> None:
    """A piece in which a long document goes on costs one label at most: it may stand behind another document."""
    documents = distinct_documents(lengths)
    stored = list(bestfit(documents, sequence_length=length, bos=BOS, eos=EOS, pad=PAD))
    read, labels = _inserted(stored, "bestfit")
    counted = Counter(label for row in labels for label in row)
    expected = Counter(token for document in framed_lists(documents, BOS) for token in document[1:])
    assert not counted - expected, "nothing twice"
    pieces = sum(len(sequence.bounds) - 1 for sequence in stored)
    assert (expected - counted).total() <= pieces - len(documents)
    for (tokens, bounds), sequence in zip(read, stored, strict=True):
        shift = 0 if sequence.tokens[0] == BOS else 1
        end = min(int(sequence.bounds[-1]) + shift, length + 1)
        assert bounds[-1] == end
        assert tokens[shift:end] == sequence.tokens[: end - shift].tolist()
        assert all(token == PAD for token in tokens[end:])
        inner = [bound + shift for bound in sequence.bounds[1:-1].tolist() if bound + shift < end]
        assert bounds == [0, *inner, end]


def test_whole_documents_that_fit_lose_no_label() -> None:
    """Each sequence is a document with its own BOS, full or padded: nothing is put in, and nothing is masked."""
    stored = list(bestfit(distinct_documents([8, 5]), sequence_length=9, bos=BOS, eos=EOS, pad=PAD))
    read, labels = _inserted(stored, "bestfit")
    assert read == as_lists(stored)
    assert sorted(map(len, labels)) == [6, 9]


def test_sequences_that_were_packed_with_bos_are_read_as_they_are() -> None:
    stored = list(chunk(distinct_documents([30]), sequence_length=9, bos=BOS, eos=EOS, insert_bos=True))
    read, labels = _inserted(stored, "chunk", sequence_bos=True)
    assert read == as_lists(stored)
    assert [len(row) for row in labels] == [9] * len(stored)


LENGTH = 12
LENGTHS = [7, 40, 3, 25, 90, 11, 5, 64, 30, 30, 2, 70]


def _split(folder: Path, packer: Literal["chunk", "bestfit", "external"] = "chunk", bos: int | None = BOS) -> Manifest:
    documents = distinct_documents(LENGTHS)
    sequences = (
        bestfit(documents, sequence_length=LENGTH, bos=bos, eos=EOS, pad=PAD)
        if packer == "bestfit"
        else chunk(documents, sequence_length=LENGTH, bos=bos, eos=EOS)
    )
    return write_split(folder, list(sequences), per_shard=9, vocab=1000, packer=packer, bos=BOS)


def _stream(data: Manifest | Mixture, **options: Any) -> TokenStream:
    settings = {"seed": 3, "batch_slots": 4, "rank": 0, "world_size": 1}
    mixture = data if isinstance(data, Mixture) else Mixture.of(data, insert_bos=True)
    return TokenStream(mixture, **settings | options)


def _rows(batch: TokenBatch) -> list[tuple[int, list[int], list[int], list[bool]]]:
    return list(
        zip(batch.slots.tolist(), batch.tokens.tolist(), batch.labels.tolist(), batch.starts.tolist(), strict=True)
    )


@pytest.mark.parametrize("document_mask", [False, True])
def test_an_epoch_of_the_stream_has_each_token_once(tmp_path: Path, document_mask: bool) -> None:
    manifest = _split(tmp_path)
    batch = _stream(manifest, document_mask=document_mask).batch(range(manifest.sequences))
    assert (batch.tokens[:, 0] == BOS).all()
    assert batch.starts[:, 0].all()
    stream, _ = stream_of(distinct_documents(LENGTHS), BOS)
    labels = Counter(batch.labels[batch.labels != IGNORED_LABEL].tolist())
    content = Counter(token for token in stream[: manifest.sequences * LENGTH] if token not in (BOS, EOS))
    assert Counter({label: count for label, count in labels.items() if label not in (BOS, EOS)}) == content
    assert (labels[BOS] == 0) == document_mask, "no label is in another document"
    shifted = batch.labels[:, :-1] != batch.tokens[:, 1:]
    assert (batch.labels[:, :-1][shifted] == IGNORED_LABEL).all()


def test_a_bos_that_is_put_in_belongs_to_the_document_that_goes_on(tmp_path: Path) -> None:
    manifest = _split(tmp_path)
    batch = _stream(manifest, document_mask=True).batch(range(manifest.sequences))
    own = torch.zeros_like(batch.starts)
    own[:, 1:] = batch.tokens[:, 1:] == BOS
    own[:, 0] = True
    assert torch.equal(batch.starts, own), "a document begins where its BOS is, and nowhere else"
    assert batch.positions is not None
    assert (batch.positions[:, 0] == 0).all()
    goes_on = ~own[:, 1]
    assert (batch.positions[goes_on, 1] == 1).all()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_ranks_together_read_what_one_reads_and_resume_where_they_stopped(tmp_path: Path, world: int) -> None:
    manifest = _split(tmp_path)
    alone = iter(_stream(manifest))
    expected = [_rows(next(alone)[0]) for _ in range(6)]
    read: list[list[Any]] = [[] for _ in range(6)]
    for rank in range(world):
        batches = iter(_stream(manifest, rank=rank, world_size=world, prefetch=rank % 2))
        for step in range(3):
            batch, cursor = next(batches)
            read[step] += _rows(batch)
        resumed = iter(_stream(manifest, rank=rank, world_size=world, start=cursor))
        for step in range(3, 6):
            read[step] += _rows(next(resumed)[0])
    assert read == expected


def test_a_mixture_puts_bos_where_a_source_lacks_it(tmp_path: Path) -> None:
    packed = list(chunk(distinct_documents(LENGTHS), sequence_length=LENGTH, bos=BOS, eos=EOS, insert_bos=True))
    sources = {
        "new": write_split(tmp_path / "new", packed, vocab=1000, bos=BOS, sequence_bos=True),
        "old": _split(tmp_path / "old"),
        "foreign": _split(tmp_path / "foreign", "external", bos=None),
    }
    mixture = Mixture(sources, [CurriculumEntry(None, dict.fromkeys(sources, 1.0))], insert_bos=True)
    batch = _stream(mixture).batch(range(3 * sources["old"].sequences))
    assert (batch.tokens[:, 0] == BOS).all()
    assert (batch.tokens[:, 1] != BOS).all()
    masked_B = (batch.labels == IGNORED_LABEL).sum(dim=1)
    assert set(masked_B.tolist()) == {0, 1}
    alone = _stream(sources["new"]).batch(range(sources["new"].sequences))
    assert (alone.labels != IGNORED_LABEL).all(), "packed with BOS: every label is content"


def test_a_damaged_sequence_stays_masked(tmp_path: Path) -> None:
    manifest = _split(tmp_path)
    shard = tmp_path / manifest.shards[0].name
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    batch = _stream(manifest, on_corrupt_sample="mask", max_masked_per_million=10).batch(range(manifest.sequences))
    (slot, _), *others = batch.faults
    assert not others
    row = batch.slots.tolist().index(slot)
    assert (batch.labels[row] == IGNORED_LABEL).all()
    assert (batch.tokens[row] == 0).all()


def test_data_whose_tokenizer_puts_no_bos_are_refused(tmp_path: Path) -> None:
    manifest = write_split(tmp_path, _chunks(LENGTHS, LENGTH, None), vocab=1000)
    with pytest.raises(UserError, match=r"insert_bos: the tokenizer of .* puts no BOS before a text: leave it out, or"):
        Mixture.of(manifest, insert_bos=True)
