"""The same global batches for every world size; exact from every cursor; refused where the order is another."""

import dataclasses
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megadistill.data import Manifest, Mixture, ShardFault, TokenStream
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.stream.order import CurriculumEntry
from megadistill.errors import UserError
from megadistill.types import IGNORED_LABEL, Cursor, TokenBatch, token_digest
from tests.unit.data.splits import SEQUENCE, random_sequences, write_split

FIELDS = ("tokens", "labels", "slots", "digests", "starts", "sources")
SEQUENCES = 137

Batches = list[tuple[TokenBatch, Cursor]]


@pytest.fixture(scope="module")
def sequences() -> list[PackedSequence]:
    return random_sequences(SEQUENCES, seed=1)


@pytest.fixture(scope="module")
def manifest(sequences: list[PackedSequence], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_split(tmp_path_factory.mktemp("split") / "train", sequences)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_split(tmp_path_factory.mktemp("other") / "train", random_sequences(50, seed=2))


def _stream(
    data: Manifest | Mixture, *, seed: int = 3, rank: int = 0, world: int = 1, batch: int = 8, **options: Any
) -> TokenStream:
    return TokenStream(data, seed=seed, batch_slots=batch, rank=rank, world_size=world, **options)


def _take(data: Manifest | Mixture, count: int, **options: Any) -> Batches:
    return list(itertools.islice(_stream(data, **options), count))


def _joined(parts: Sequence[TokenBatch]) -> TokenBatch:
    rows: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in FIELDS}
    return dataclasses.replace(parts[0], **rows, faults=sum((part.faults for part in parts), ()))


def _same(one: TokenBatch, other: TokenBatch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def _through_json(cursor: Cursor) -> Cursor:
    return Cursor.from_state(json.loads(json.dumps(cursor.state())))


# ---- what a batch is


def test_a_row_is_a_sequence_shifted_by_one(manifest: Manifest, sequences: list[PackedSequence]) -> None:
    (batch, cursor), (following, _) = _take(manifest, 2)
    assert batch.tokens.shape == batch.labels.shape == batch.starts.shape == (8, SEQUENCE)
    assert batch.tokens.dtype == batch.labels.dtype == batch.slots.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert batch.labels.is_contiguous()
    assert batch.slots.tolist() == list(range(8))
    assert following.slots.tolist() == list(range(8, 16))
    assert torch.equal(batch.digests, token_digest(batch.tokens))
    assert cursor.next_slot == 8
    assert batch.valid_tokens == 8 * SEQUENCE
    places = Mixture.of(manifest).order(3).locate(np.arange(8))
    for row, (_, shard, number) in enumerate(places.tolist()):
        sequence = sequences[40 * shard + number]
        assert batch.tokens[row].tolist() == sequence.tokens[:-1].tolist()
        assert batch.labels[row].tolist() == sequence.tokens[1:].tolist()
        assert batch.starts[row].nonzero().flatten().tolist() == [b for b in sequence.bounds.tolist() if b < SEQUENCE]


def test_with_a_document_mask_no_label_lies_in_another_document(manifest: Manifest) -> None:
    plain, masked = (_stream(manifest, document_mask=mask).batch(range(SEQUENCES)) for mask in (False, True))
    assert (plain.document_mask, masked.document_mask) == (False, True)
    assert torch.equal(plain.tokens, masked.tokens)
    crossing = torch.zeros_like(plain.starts)
    crossing[:, :-1] = plain.starts[:, 1:]
    last = masked.labels[:, -1] == IGNORED_LABEL  # where a document begins with the label of the last token
    assert torch.equal((masked.labels == IGNORED_LABEL)[:, :-1], crossing[:, :-1])
    assert 0 < last.sum() < SEQUENCES
    predicted = masked.labels != IGNORED_LABEL
    assert torch.equal(masked.labels[predicted], plain.labels[predicted])


def test_whole_documents_learn_nothing_of_each_other_nor_of_padding(tmp_path: Path) -> None:
    sequences = random_sequences(30, seed=5, full=False)
    split = write_split(tmp_path, sequences, packer="bestfit")
    batch = _stream(split).batch(range(30))
    assert batch.valid_tokens == split.tokens
    assert batch.document_mask is False


def test_padding_of_external_sequences_is_not_predicted(tmp_path: Path) -> None:
    sequences = random_sequences(30, seed=5, full=False)
    split = write_split(tmp_path, sequences, packer="external")
    assert _stream(split).batch(range(30)).valid_tokens == sum(int(sequence.bounds[-1]) - 1 for sequence in sequences)


def test_a_document_mask_needs_the_bounds_of_documents(manifest: Manifest) -> None:
    sample_format = manifest.sample_format.model_copy(update={"bounds": None})
    blind = manifest.model_copy(update={"sample_format": sample_format})
    with pytest.raises(UserError, match=r"data.document_mask: the shards of .* do not record where documents begin"):
        _stream(blind, document_mask=True)


def test_an_empty_range_is_an_empty_batch(manifest: Manifest) -> None:
    assert _stream(manifest).batch(range(0)).tokens.shape == (0, SEQUENCE)


# ---- worlds and resumes


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_world(manifest: Manifest, world: int, prefetch: int) -> None:
    whole = _take(manifest, 5)
    ranks = [_take(manifest, 5, rank=rank, world=world, prefetch=prefetch) for rank in range(world)]
    for step, (batch, cursor) in enumerate(whole):
        assert _same(_joined([ranks[rank][step][0] for rank in range(world)]), batch)
        assert {ranks[rank][step][1] for rank in range(world)} == {cursor}


def test_a_resume_at_any_cursor_is_the_uninterrupted_stream(manifest: Manifest) -> None:
    whole = _take(manifest, 8)
    for done in range(1, 8):
        rest = _take(manifest, 8 - done, start=_through_json(whole[done - 1][1]))
        assert all(_same(one[0], other[0]) for one, other in zip(rest, whole[done:], strict=True))
        assert [cursor for _, cursor in rest] == [cursor for _, cursor in whole[done:]]


def test_a_resume_with_another_world_and_batch_loses_nothing(manifest: Manifest) -> None:
    whole = _stream(manifest, batch=1).batch(range(24))
    _, cursor = _take(manifest, 1)[0]
    resumed = [_take(manifest, 1, rank=rank, world=4, batch=16, start=cursor)[0][0] for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in resumed]), whole.tokens[8:24])


def test_an_epoch_is_every_sequence_once_and_the_next_is_another_order(manifest: Manifest) -> None:
    stream = _stream(manifest)
    first, second = stream.batch(range(SEQUENCES)), stream.batch(range(SEQUENCES, 2 * SEQUENCES))
    assert not torch.equal(first.tokens, second.tokens)
    assert sorted(first.tokens.tolist()) == sorted(second.tokens.tolist())


def test_iterating_twice_starts_twice(manifest: Manifest) -> None:
    stream = _stream(manifest)
    assert _same(next(iter(stream))[0], next(iter(stream))[0])


@pytest.mark.parametrize(
    ("world", "rows"),
    [(3, None), (3, 4), (3, 5), (5, None), (5, 3), (9, 1), (11, 2), (2, 4), (2, 5)],
)
@pytest.mark.parametrize("skips", [(), ((11, 14), (23, 24))])
def test_the_slots_of_a_batch_are_a_partition_and_surplus_repeats_the_last(
    manifest: Manifest, world: int, rows: int | None, skips: tuple[tuple[int, int], ...]
) -> None:
    """The proper rows of all ranks, in rank order, are the batch of one rank; the surplus ones have its last slot."""
    whole = _take(manifest, 4, skips=skips)
    ranks = [
        _take(manifest, 4, rank=rank, world=world, skips=skips, rows=None if rows is None else lambda _: rows)
        for rank in range(world)
    ]
    for step, (expected, cursor) in enumerate(whole):
        batches = [rank[step][0] for rank in ranks]
        assert {len(batch) for batch in batches} == {rows or -(-8 // world)}
        assert {rank[step][1] for rank in ranks} == {cursor}, "the stream takes exactly a global batch"
        joined = _joined(batches)
        surplus = torch.cat([batch.surplus for batch in batches])
        assert torch.equal(surplus, torch.arange(len(surplus)) >= 8)
        for name in FIELDS:
            assert torch.equal(getattr(joined, name)[~surplus], getattr(expected, name)), name
        assert (joined.labels[surplus] == IGNORED_LABEL).all()
        for name in ("tokens", "slots", "digests", "starts", "sources"):
            last = getattr(expected, name)[-1:]
            assert torch.equal(getattr(joined, name)[surplus], last.expand_as(getattr(joined, name)[surplus])), name
        assert joined.valid_tokens == expected.valid_tokens


def test_ranks_without_a_row_of_the_batch_know_the_sources_of_their_peers(manifest: Manifest, other: Manifest) -> None:
    """Of 8 slots on 3 x 4 rows: the third rank is all surplus."""
    mixture = Mixture({"a": manifest, "b": other}, [CurriculumEntry(None, {"a": 0.5, "b": 0.5})])
    whole = _take(mixture, 3)
    peers = [_take(mixture, 3, rank=rank, world=3, rows=lambda _: 4, peers=range(3)) for rank in range(3)]
    for step, (expected, _) in enumerate(whole):
        sources = torch.cat([expected.sources, expected.sources[-1:].expand(4)]).view(3, 4).T
        for rank in peers:
            assert torch.equal(rank[step][0].peer_sources, sources)
        assert peers[2][step][0].surplus.all()


def test_the_micro_batches_of_a_batch_have_its_surplus_rows(manifest: Manifest) -> None:
    ((batch, _),) = _take(manifest, 1, rank=1, world=2, rows=lambda _: 6)
    assert [micro.surplus.tolist() for micro in batch.micro_batches(3)] == [[False, False, True], [True] * 3]


# ---- mixtures


def _mixture(manifest: Manifest, other: Manifest, *curriculum: CurriculumEntry) -> Mixture:
    return Mixture(
        {"web": manifest, "code": other}, curriculum or (CurriculumEntry(None, {"web": 0.75, "code": 0.25}),)
    )


def test_a_mixture_reads_each_source_at_its_share(manifest: Manifest, other: Manifest) -> None:
    rows = {tuple(row) for row in _stream(other).batch(range(50)).tokens.tolist()}
    mixed = _stream(_mixture(manifest, other)).batch(range(200)).tokens.tolist()
    assert sum(tuple(row) in rows for row in mixed) == 50
    assert len({tuple(row) for row in mixed if tuple(row) in rows}) == 50, "an epoch of 50 sequences"


def test_rows_carry_the_number_of_their_source(manifest: Manifest, other: Manifest) -> None:
    """`sources` indexes `Mixture.names`, in any world, and micro-batches keep it."""
    mixture = _mixture(manifest, other)
    by_row = {
        row.tobytes(): mixture.names.index(name)
        for name, split in mixture.sources.items()
        for row in _stream(split).batch(range(split.sequences)).tokens.numpy()
    }
    for rank in range(2):
        for batch, _ in _take(mixture, 5, rank=rank, world=2, prefetch=rank):
            assert batch.sources.tolist() == [by_row[row.tobytes()] for row in batch.tokens.numpy()]
            assert torch.equal(torch.cat([part.sources for part in batch.micro_batches(2)]), batch.sources)
    assert _take(manifest, 1)[0][0].sources.tolist() == [0] * 8


@pytest.mark.parametrize("skips", [(), [(3, 9), (20, 45)]])
def test_a_rank_knows_the_sources_of_its_peers_rows(manifest: Manifest, other: Manifest, skips: Any) -> None:
    """Of all ranks of its group, without a message; a micro-batch of some sources has the peers' numbers of rows."""
    mixture = _mixture(manifest, other, CurriculumEntry(16, {"web": 1.0}), CurriculumEntry(None, {"web": 1, "code": 2}))
    of_rank = [_take(mixture, 5, rank=rank, world=4, skips=skips, peers=range(2, 4)) for rank in range(4)]
    for step in range(5):
        truth = torch.stack([of_rank[rank][step][0].sources for rank in (2, 3)], dim=1)
        for rank in (2, 3):
            batch = of_rank[rank][step][0]
            assert torch.equal(batch.peer_sources, truth)
            for micro, truth_of_micro in zip(batch.micro_batches(1), torch.split(truth, 1), strict=True):
                code = micro.of_sources({mixture.names.index("code")})
                peers_rows = (truth_of_micro == mixture.names.index("code")).sum(dim=0).tolist()
                assert code.peer_rows == (None if all(peers_rows) else tuple(peers_rows))
                assert len(code) == len(code.labels) == peers_rows[rank - 2]
    assert 0 < truth.sum() < truth.numel(), "both sources are there"


def test_stages_that_were_not_reached_may_be_edited_and_a_consumed_one_is_refused(
    manifest: Manifest, other: Manifest
) -> None:
    before = _mixture(
        manifest, other, CurriculumEntry(40, {"web": 1}), CurriculumEntry(None, {"web": 0.5, "code": 0.5})
    )
    later = _mixture(manifest, other, CurriculumEntry(48, {"web": 1}), CurriculumEntry(None, {"code": 1}))
    whole = _take(before, 5)
    resumed = _take(later, 2, start=_through_json(whole[3][1]))  # slot 32
    assert _same(resumed[0][0], whole[4][0])
    assert resumed[0][1].fingerprint != whole[4][1].fingerprint
    with pytest.raises(UserError, match=r"slot 48.*entry 1 was web 1 parts for 40 sequences, is web 1 parts\b.*undo"):
        _stream(later, start=_through_json(_take(before, 6)[5][1]))


def test_a_cursor_of_another_order_is_refused_and_says_why(manifest: Manifest, other: Manifest) -> None:
    start = _take(manifest, 1)[0][1]
    for data, seed, reason in ((manifest, 4, "the seed was 3, is 4"), (other, 3, "source data was the manifest")):
        with pytest.raises(UserError, match=rf"slot 8, belongs to another order of the data.*{reason}") as refused:
            _stream(data, seed=seed, start=start)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="slots count from 0"):
        _stream(manifest, start=dataclasses.replace(start, next_slot=-1))
    assert _stream(manifest, batch=4, rank=1, world=2).fingerprint == start.fingerprint, "the batch may change"


def test_sources_that_do_not_fit_together_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    short = write_split(tmp_path / "short", random_sequences(5, seed=1, sequence=8))
    with pytest.raises(UserError, match="b has sequence_length 8, a has 24"):
        Mixture({"a": manifest, "b": short}, (CurriculumEntry(None, {"a": 1, "b": 1}),))
    foreign = write_split(tmp_path / "foreign", random_sequences(5, seed=1), tokenizer_sha256="f" * 64)
    with pytest.raises(UserError, match="b was made by another tokenizer"):
        Mixture({"a": manifest, "b": foreign}, (CurriculumEntry(None, {"a": 1}),))


# ---- skips

SKIPS = [(10, 13), (20, 45)]
NOT_SKIPPED = [slot for slot in range(200) if not any(first <= slot < stop for first, stop in SKIPS)]


@pytest.mark.parametrize("world", [1, 2, 8])
def test_skipped_slots_are_left_out_for_every_world(manifest: Manifest, world: int) -> None:
    ranks = [_take(manifest, 12, rank=rank, world=world, skips=SKIPS) for rank in range(world)]
    for step in range(12):
        batch = _joined([ranks[rank][step][0] for rank in range(world)])
        assert batch.slots.tolist() == NOT_SKIPPED[8 * step : 8 * step + 8]
        assert _same(batch, _joined([_stream(manifest).batch(range(s, s + 1)) for s in batch.slots.tolist()]))


def test_skips_are_journalled_once_they_are_passed_and_then_they_hold(manifest: Manifest) -> None:
    whole = _take(manifest, 6, skips=SKIPS)
    assert [cursor.skips for _, cursor in whole[:3]] == [(), ((10, 13),), ((10, 13), (20, 45))]
    assert [cursor.next_slot for _, cursor in whole[:3]] == [8, 19, 52]
    for done in range(1, 6):
        for skips in (SKIPS, [] if done > 2 else SKIPS):
            rest = _take(manifest, 6 - done, start=_through_json(whole[done - 1][1]), skips=skips)
            assert [batch.slots.tolist() for batch, _ in rest] == [batch.slots.tolist() for batch, _ in whole[done:]]
            assert rest[-1][1] == whole[-1][1]


def test_a_skip_may_be_added_ahead_of_the_position_and_not_behind_it(manifest: Manifest) -> None:
    start = _take(manifest, 2)[1][1]
    assert _take(manifest, 1, start=start, skips=[(16, 20)])[0][0].slots.tolist() == list(range(20, 28))
    for skip in ((3, 5), (10, 20)):
        with pytest.raises(UserError, match=r"begins before slot 16.*resume from an earlier checkpoint"):
            _stream(manifest, start=start, skips=[skip])


# ---- damage


def _damage(manifest: Manifest, slots: Sequence[int], *, seed: int = 3) -> dict[Path, bytes]:
    """Flips a byte of the tokens of each slot's sequence; the files as they were."""
    saved: dict[Path, bytes] = {}
    for _, shard, sequence in Mixture.of(manifest).order(seed).locate(np.array(slots)).tolist():
        path = Path(manifest.folder.location) / manifest.shards[shard].name
        data = bytearray(path.read_bytes())
        saved.setdefault(path, bytes(data))
        rows = np.load(f"{path}.idx.npy")
        data[rows[sequence][0] + rows[sequence][3] + 140] ^= 1
        path.write_bytes(data)
    return saved


def test_a_damaged_sequence_ends_the_run_with_one_line(manifest: Manifest, tmp_path: Path) -> None:
    split = write_split(tmp_path / "train", random_sequences(SEQUENCES, seed=1))
    _damage(split, [11])
    batches = iter(_stream(split))
    next(batches)
    with pytest.raises(
        ShardFault, match=r"slot 11, shard \d+: .*shard-0000\d.tar sequence \d+ at byte \d+: expected crc32"
    ):
        next(batches)


@pytest.mark.parametrize("world", [1, 4])
def test_mask_masks_the_row_and_moves_nothing(tmp_path: Path, world: int) -> None:
    split = write_split(tmp_path / "train", random_sequences(SEQUENCES, seed=1))
    whole = _take(split, 5)
    saved = _damage(split, [11, 13, 30])
    ranks = [_take(split, 5, rank=rank, world=world, on_corrupt_sample="mask") for rank in range(world)]
    for step, (healthy, _) in enumerate(whole):
        batch = _joined([ranks[rank][step][0] for rank in range(world)])
        for row, slot in enumerate(batch.slots.tolist()):
            if slot in (11, 13, 30):
                assert batch.tokens[row].eq(0).all()
                assert batch.labels[row].eq(IGNORED_LABEL).all()
            else:
                assert torch.equal(batch.tokens[row], healthy.tokens[row])
                assert torch.equal(batch.labels[row], healthy.labels[row])
        assert [slot for slot, _ in batch.faults] == [slot for slot in batch.slots.tolist() if slot in (11, 13, 30)]
    if world == 1:
        assert [cursor.masked_slots for _, cursor in ranks[0]] == [(), (11, 13), (11, 13), (11, 13, 30), (11, 13, 30)]
    cursor = ranks[0][1][1]
    agreed = _stream(split, on_corrupt_sample="mask").with_masked(cursor, (11, 13))
    for path, data in saved.items():
        path.write_bytes(data)
    resumed = _take(split, 4, start=_through_json(dataclasses.replace(agreed, next_slot=8)), on_corrupt_sample="mask")
    assert resumed[0][0].labels[3].eq(IGNORED_LABEL).all(), "the cursor wins over the restored shard"
    assert resumed[0][0].faults == (), "a slot masked before is not reported again"
    assert torch.equal(resumed[2][0].tokens, whole[3][0].tokens), "slot 30 was never masked, and is whole again"


def test_too_many_masked_samples_in_a_million_slots_end_the_run(tmp_path: Path) -> None:
    split = write_split(tmp_path / "train", random_sequences(SEQUENCES, seed=1))
    _damage(split, [1, 5, 9])
    _take(split, 3, on_corrupt_sample="mask", max_masked_per_million=3)
    with pytest.raises(
        ShardFault, match=r"slots 1 to 9 have more than data.max_masked_per_million 2 damaged sequences"
    ):
        _take(split, 3, on_corrupt_sample="mask", max_masked_per_million=2)
    stream = _stream(split, on_corrupt_sample="mask", max_masked_per_million=2)
    cursor = dataclasses.replace(stream.start, next_slot=4_000_000)
    assert stream.with_masked(cursor, [5, 9, 2_000_000, 1_000_005]).masked_slots == (5, 9, 1_000_005, 2_000_000)
    with pytest.raises(ShardFault, match="more than"):
        stream.with_masked(cursor, [1_000_004])


# ---- reading ahead


def test_what_is_raised_while_reading_ahead_is_raised_in_its_place(tmp_path: Path) -> None:
    split = write_split(tmp_path / "train", random_sequences(SEQUENCES, seed=1))
    healthy = _take(split, 2)
    _damage(split, [17])
    batches = iter(_stream(split, prefetch=4))
    assert all(_same(next(batches)[0], other[0]) for other in healthy)
    with pytest.raises(ShardFault, match="slot 17"):
        next(batches)


def test_the_thread_reads_no_further_than_it_may_and_ends_with_its_reader(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = TokenStream._read

    def counted(self: TokenStream, slots: Any, *arguments: Any, **options: Any) -> TokenBatch:
        read.append(len(slots))
        return plain(self, slots, *arguments, **options)

    monkeypatch.setattr(TokenStream, "_read", counted)
    batches = iter(_stream(manifest, prefetch=3))
    next(batches)
    for _ in range(3000):
        if len(read) >= 4:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.2)
    assert len(read) == 4, "one was taken, three wait"
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("token-stream")]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_for_an_accelerator_are_pinned_where_they_are_read(manifest: Manifest, prefetch: int) -> None:
    plain, _ = next(iter(_stream(manifest, prefetch=prefetch)))
    pinned: list[int] = []

    def pinning(tensor: Tensor) -> Tensor:
        pinned.append(threading.get_ident())
        return tensor.clone()

    device, used = torch.device("lazy", 3), list[tuple[torch.device, int]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", pinning)
        patch.setattr(torch.accelerator, "set_device_index", lambda each: used.append((each, threading.get_ident())))
        batch, _ = next(iter(_stream(manifest, prefetch=prefetch, pinned_for=device)))
    assert len(pinned) >= 3, "tokens, labels and starts"
    assert (threading.get_ident() in pinned) == (prefetch == 0)
    assert used == ([(device, pinned[0])] if prefetch else []), "a thread has the first device until it is told"
    assert all(torch.equal(getattr(batch, name), getattr(plain, name)) for name in ("tokens", "labels", "starts"))
