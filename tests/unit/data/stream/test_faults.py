"""The nine faults and an edited manifest, under both policies: none is silent, and none moves another sequence."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadistill.data import Manifest, Mixture, ShardFault, TokenStream
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.stream.stream import OnCorruptSample
from megadistill.errors import UserError
from megadistill.types import IGNORED_LABEL, TokenBatch
from tests.unit.data.splits import SEQUENCE, VOCAB, Column, random_sequences, write_split

SEQUENCES, PER_SHARD, SEED = 90, 30, 4
BATCH = 10
VICTIM = 1
"""The shard that is damaged, but for the swap, which takes the one after it too."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "train"
    write_split(folder, random_sequences(SEQUENCES, seed=1), per_shard=PER_SHARD)
    return folder


def _tar(folder: Path, shard: int = VICTIM) -> Path:
    return folder / f"shard-{shard:05d}.tar"


def _index(folder: Path) -> Path:
    return folder / f"shard-{VICTIM:05d}.tar.idx.npy"


def _flip(folder: Path, column: Column | None) -> None:
    """Flips, in sequence 7, the last byte of its tokens, or a byte of its first tar header."""
    row = np.load(_index(folder))[7]
    at = row[Column.START] + (100 if column is None else row[Column.TOKENS_AT] + row[Column.TOKENS_BYTES] - 2)
    data = bytearray(_tar(folder).read_bytes())
    data[at] ^= 1
    _tar(folder).write_bytes(data)


def _truncate(folder: Path) -> None:
    os.truncate(_tar(folder), _tar(folder).stat().st_size - 4000)


def _empty(folder: Path) -> None:
    _tar(folder).write_bytes(b"")


def _swap(folder: Path) -> None:
    first, second = _tar(folder).read_bytes(), _tar(folder, VICTIM + 1).read_bytes()
    _tar(folder).write_bytes(second)
    _tar(folder, VICTIM + 1).write_bytes(first)


def _rewritten(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """A split whose sequence 37 was written wrong, with an index and a manifest that vouch for it."""
    sequences = random_sequences(SEQUENCES, seed=1)
    sequence = sequences[PER_SHARD * VICTIM + 7]
    sequences[PER_SHARD * VICTIM + 7] = PackedSequence(change(sequence.tokens), sequence.bounds)
    shutil.rmtree(folder)
    write_split(folder, sequences, per_shard=PER_SHARD)


def _short(folder: Path) -> None:
    _rewritten(folder, lambda tokens: tokens[:-3])


def _past_the_vocabulary(folder: Path) -> None:
    _rewritten(folder, lambda tokens: np.where(np.arange(SEQUENCE + 1) == 5, VOCAB, tokens))


# What is done, and which sequences of the shard it takes: all of them, or one.
FAULTS: dict[str, tuple[Callable[[Path], None], list[tuple[int, int]], str]] = {
    "truncated tar": (_truncate, [(VICTIM, sequence) for sequence in range(PER_SHARD)], "bytes, found"),
    "zero-length shard": (_empty, [(VICTIM, sequence) for sequence in range(PER_SHARD)], "it is empty"),
    "missing shard": (lambda folder: _tar(folder).unlink(), [(VICTIM, u) for u in range(PER_SHARD)], "No such file"),
    "missing index": (lambda folder: _index(folder).unlink(), [(VICTIM, u) for u in range(PER_SHARD)], "No such file"),
    "flipped byte in tokens": (lambda folder: _flip(folder, Column.TOKENS_AT), [(VICTIM, 7)], "expected crc32"),
    "flipped byte in a header": (lambda folder: _flip(folder, None), [(VICTIM, 7)], "expected crc32"),
    "swapped shards": (
        _swap,
        [(shard, sequence) for shard in (VICTIM, VICTIM + 1) for sequence in range(PER_SHARD)],
        "expected",
    ),
    "short sequence": (_short, [(VICTIM, 7)], "expected"),
    "token id past the vocabulary": (_past_the_vocabulary, [(VICTIM, 7)], f"found {VOCAB}"),
}


def _batches(folder: Path, policy: OnCorruptSample) -> list[TokenBatch]:
    """An epoch."""
    manifest = Manifest.load(folder / "manifest.json")
    stream = TokenStream(manifest, seed=SEED, batch_slots=BATCH, rank=0, world_size=1, on_corrupt_sample=policy)
    return [batch for batch, _ in itertools.islice(stream, SEQUENCES // BATCH)]


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> tuple[Path, list[int], str, list[TokenBatch]]:
    """The damaged split, the slots that it takes, the message, and the healthy batches at the same slots."""
    damage, places, message = FAULTS[request.param]
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    damage(folder)
    order = Mixture.of(Manifest.load(folder / "manifest.json")).order(SEED)
    slots = [
        slot
        for slot, (_, shard, sequence) in enumerate(order.locate(np.arange(SEQUENCES)).tolist())
        if (shard, sequence) in places
    ]
    assert len(slots) == len(places)
    return folder, slots, message, _batches(whole, "fail")


def test_fail_ends_the_run_at_the_first_damaged_slot(fault: tuple[Path, list[int], str, list[TokenBatch]]) -> None:
    folder, slots, message, _ = fault
    with pytest.raises(ShardFault, match=rf"^slot {slots[0]}, shard \d: ") as refused:
        _batches(folder, "fail")
    assert message in str(refused.value)
    assert "shard-0000" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_damaged_slots_are_masked_and_no_other(fault: tuple[Path, list[int], str, list[TokenBatch]]) -> None:
    folder, slots, expected, healthy = fault
    batches = _batches(folder, "mask")
    assert [slot for batch in batches for slot, _ in batch.faults] == slots
    assert all(expected in message for batch in batches for _, message in batch.faults)
    for batch, truth in zip(batches, healthy, strict=True):
        for row, slot in enumerate(batch.slots.tolist()):
            if slot in slots:
                assert batch.labels[row].eq(IGNORED_LABEL).all()
            else:
                assert torch.equal(batch.tokens[row], truth.tokens[row])
                assert torch.equal(batch.labels[row], truth.labels[row])


def test_a_damaged_slot_is_reported_once_where_surplus_rows_repeat_it(
    fault: tuple[Path, list[int], str, list[TokenBatch]],
) -> None:
    """Batches of one slot on two ranks of two rows: three of the four rows are surplus."""
    folder, slots, *_ = fault
    manifest = Manifest.load(folder / "manifest.json")
    options: dict[str, Any] = {"seed": SEED, "batch_slots": 1, "world_size": 2, "on_corrupt_sample": "mask"}
    streams = [TokenStream(manifest, rank=rank, rows=lambda _: 2, **options) for rank in range(2)]
    ranks = [[batch for batch, _ in itertools.islice(stream, SEQUENCES)] for stream in streams]
    assert [slot for batch in ranks[0] for slot, _ in batch.faults] == slots
    assert not any(batch.faults for batch in ranks[1])
    for one, other in zip(*ranks, strict=True):
        assert (one.digests == one.digests[0]).all()
        assert (other.digests == one.digests[0]).all(), "a surplus row has the tokens of its slot, masked or not"


@pytest.mark.parametrize("policy", ["fail", "mask"])
def test_a_manifest_edited_by_hand_is_refused(whole: Path, tmp_path: Path, policy: OnCorruptSample) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][0]["sequences"] -= 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"manifest\.json is not a valid|was changed after it was written"):
        _batches(folder, policy)
