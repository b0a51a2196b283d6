"""The same global batches for every world size; exact from every cursor; refused where the order is another."""

import itertools
import json

import pytest
import torch

from megadistill.data import Manifest, TokenStream
from megadistill.errors import UserError
from megadistill.records import Cursor, TokenBatch, token_digest
from tests.unit.data.conftest import SEQUENCE

FIELDS = ("tokens", "labels", "slots", "digests")


def _take(
    manifest: Manifest, count: int, *, rank: int = 0, world: int = 1, batch: int = 8, start: Cursor | None = None
) -> list[tuple[TokenBatch, Cursor]]:
    stream = TokenStream(manifest, seed=3, batch_slots=batch, rank=rank, world_size=world, start=start)
    return list(itertools.islice(stream, count))


def _same(one: TokenBatch, other: TokenBatch) -> bool:
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in FIELDS)


def test_a_batch_is_units_shifted_by_one(manifest: Manifest) -> None:
    (batch, cursor), (following, _) = _take(manifest, 2)
    assert batch.tokens.shape == batch.labels.shape == (8, SEQUENCE)
    assert batch.tokens.dtype == batch.labels.dtype == batch.slots.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.slots.tolist() == list(range(8))
    assert following.slots.tolist() == list(range(8, 16))
    assert torch.equal(batch.digests, token_digest(batch.tokens))
    assert cursor.next_slot == 8
    assert batch.valid_tokens == 8 * SEQUENCE


@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_world(manifest: Manifest, world: int) -> None:
    whole = _take(manifest, 5)
    ranks = [_take(manifest, 5, rank=rank, world=world) for rank in range(world)]
    for step, (batch, cursor) in enumerate(whole):
        parts = [ranks[rank][step][0] for rank in range(world)]
        joined = TokenBatch(**{field: torch.cat([getattr(part, field) for part in parts]) for field in FIELDS})
        assert _same(joined, batch)
        assert {ranks[rank][step][1] for rank in range(world)} == {cursor}


def test_a_resume_at_any_cursor_is_the_uninterrupted_stream(manifest: Manifest) -> None:
    whole = _take(manifest, 8)
    for done in range(1, 8):
        state = json.loads(json.dumps(whole[done - 1][1].state()))
        rest = _take(manifest, 8 - done, start=Cursor.from_state(state))
        assert all(_same(one[0], other[0]) for one, other in zip(rest, whole[done:], strict=True))
        assert [cursor for _, cursor in rest] == [cursor for _, cursor in whole[done:]]


def test_a_resume_with_another_world_and_batch_loses_nothing(manifest: Manifest) -> None:
    whole = TokenStream(manifest, seed=3, batch_slots=1, rank=0, world_size=1).batch(range(24))
    _, cursor = _take(manifest, 1)[0]
    resumed = [_take(manifest, 1, rank=rank, world=4, batch=16, start=cursor)[0][0] for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in resumed]), whole.tokens[8:24])


def test_an_epoch_is_every_unit_once_and_the_next_is_another_order(manifest: Manifest) -> None:
    stream = TokenStream(manifest, seed=3, batch_slots=1, rank=0, world_size=1)
    n = manifest.units
    first, second = stream.batch(range(n)), stream.batch(range(n, 2 * n))
    assert not torch.equal(first.tokens, second.tokens)
    assert sorted(first.tokens.tolist()) == sorted(second.tokens.tolist())


def test_iterating_twice_starts_twice(manifest: Manifest) -> None:
    stream = TokenStream(manifest, seed=3, batch_slots=4, rank=0, world_size=1)
    assert _same(next(iter(stream))[0], next(iter(stream))[0])


def test_an_empty_range_is_an_empty_batch(manifest: Manifest) -> None:
    batch = TokenStream(manifest, seed=3, batch_slots=1, rank=0, world_size=1).batch(range(0))
    assert batch.tokens.shape == (0, SEQUENCE)


@pytest.mark.parametrize(("batch", "message"), [(10, "8 or 12"), (3, "are 4"), (0, "are 4")])
def test_a_batch_that_does_not_divide_names_those_that_do(manifest: Manifest, batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenStream(manifest, seed=3, batch_slots=batch, rank=0, world_size=4)


def test_a_cursor_of_another_order_is_refused(manifest: Manifest) -> None:
    stream = TokenStream(manifest, seed=3, batch_slots=8, rank=0, world_size=1)
    assert stream.fingerprint == TokenStream(manifest, seed=3, batch_slots=4, rank=1, world_size=2).fingerprint
    heldout = Manifest.load(manifest.folder.parent / "heldout" / "manifest.json")
    start = Cursor(stream.fingerprint, 8)
    for other, seed in ((manifest, 4), (heldout, 3)):
        with pytest.raises(UserError, match=r"belongs to another order of the data.*start a new run") as refused:
            TokenStream(other, seed=seed, batch_slots=8, rank=0, world_size=1, start=start)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="slots count from 0"):
        TokenStream(manifest, seed=3, batch_slots=8, rank=0, world_size=1, start=Cursor(stream.fingerprint, -1))


def test_more_shards_than_are_kept_open(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadistill.data.stream.OPEN_SHARDS", 1)
    few = TokenStream(manifest, seed=3, batch_slots=8, rank=0, world_size=1).batch(range(64))
    monkeypatch.undo()
    assert _same(few, TokenStream(manifest, seed=3, batch_slots=8, rank=0, world_size=1).batch(range(64)))
