"""Manifests of millions of shards, and what the rows of one rank open: bounds on counts, bytes and memory.

Shards are made up: one tar and one index stand for all of them, so that a split of any size takes seconds to make.
"""

import gc
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megadistill.data import Manifest, Mixture
from megadistill.data.shards import shard_cache
from megadistill.data.shards.manifest import MAX_LISTED, PackerRecord, SourceRecord, TokenizerRecord
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.shards.shard import INDEX_SUFFIX, Shard
from megadistill.data.shards.shard_cache import ShardCache
from megadistill.data.shards.shard_table import NamePattern, ShardTable
from megadistill.data.shards.tar import SAMPLE_FORMAT, write_shard
from megadistill.data.storage.base import Bytes, Folder
from megadistill.data.stream.shuffle import WINDOW
from tests.unit.data.splits import random_sequences

MIB = 1 << 20


def _table(shards: int, *, sequences: int = 3663, names: NamePattern | None = None) -> ShardTable:
    """A table of made-up shards, without a Python object a shard."""
    rows = np.empty(shards, dtype=ShardTable.of([_shard("a-0.tar", 1)])._rows_P.dtype)
    random = np.random.default_rng(0)
    rows["sequences"] = sequences + random.integers(0, 100, shards)
    rows["bytes"] = rows["sequences"] * 34_816
    for column in ("sha256", "index_sha256"):
        rows[column] = np.frombuffer(random.bytes(32 * shards), dtype="V32")
    return ShardTable(rows, names or NamePattern("shard-", 5, ".tar", 0))


def _shard(name: str, sequences: int) -> Shard:
    return Shard(name=name, sequences=sequences, bytes=1, sha256="0" * 64, index_sha256="0" * 64)


def _manifest(table: ShardTable, *, sequence_length: int = 8192, vocab_size: int = 100_000) -> Manifest:
    return Manifest(
        version=3,
        split="train",
        sequence_length=sequence_length,
        dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        vocab_size=vocab_size,
        sample_format=SAMPLE_FORMAT,
        tokenizer=TokenizerRecord(kind="sentencepiece", file="tokenizer.model", sha256="0" * 64),
        packer=PackerRecord(name="chunk", version=1, bos=None, eos=2),
        documents=None,
        tokens=int(table.sequences.sum()) * sequence_length,
        text_bytes=None,
        source=SourceRecord(inputs=("made up",)),
        shards=table,
    )


@dataclass
class _Cost:
    peak_bytes: int = 0
    """Most memory that Python and numpy allocated at once; a mapped file is none of it."""
    shards: int = 0
    """Objects of the class Shard that were made."""


@contextmanager
def _measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Cost]:
    cost = _Cost()
    make = ShardTable.__getitem__

    def counted(table: ShardTable, number: int) -> Shard:
        cost.shards += 1
        return make(table, number)

    monkeypatch.setattr(ShardTable, "__getitem__", counted)
    gc.collect()
    tracemalloc.start()
    try:
        yield cost
    finally:
        _, cost.peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        monkeypatch.undo()


@pytest.mark.parametrize("shards", [100_000, *(pytest.param(n, marks=pytest.mark.thorough) for n in (500_000, 2**21))])
def test_a_start_reads_80_bytes_a_shard_and_keeps_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    written = _manifest(_table(shards))
    written.write(tmp_path)
    assert (tmp_path / "shards.npy").stat().st_size == 80 * shards + 192
    assert (tmp_path / "manifest.json").stat().st_size < 2048
    with _measured(monkeypatch) as cost:
        manifest = Manifest.load(tmp_path / "manifest.json")
        loaded = tracemalloc.get_traced_memory()[1]
        order = Mixture.of(manifest).order(seed=0)
        places = order.locate(np.arange(4096))
        assert manifest.bytes > manifest.sequences > 0
    assert loaded < 2 * MIB, "loading allocates nothing that grows with the shards"
    assert cost.peak_bytes < 8 * MIB + 8 * shards < 50 * MIB, "the order keeps the end of each shard"
    assert cost.shards == 0
    assert manifest.fingerprint == written.fingerprint
    assert order.fingerprint == Mixture.of(written).order(seed=0).fingerprint
    np.testing.assert_array_equal(places, Mixture.of(written).order(seed=0).locate(np.arange(4096)))
    assert manifest.shards[shards - 1] == written.shards[shards - 1]
    assert manifest.shards[shards - 1].name == f"shard-{shards - 1}.tar"


def test_small_splits_are_one_file_and_large_ones_two(tmp_path: Path) -> None:
    for shards, files in ((MAX_LISTED, ["manifest.json"]), (MAX_LISTED + 1, ["manifest.json", "shards.npy"])):
        folder = tmp_path / f"{shards}"
        folder.mkdir()
        _manifest(_table(shards)).write(folder)
        assert sorted(path.name for path in folder.iterdir()) == files


# Opens and bytes of a rank's rows


@pytest.fixture(autouse=True)
def _node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without anything that is known from before."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@dataclass
class _MadeUpFolder:
    """Serves one tar and one index under the names of all shards, and counts."""

    tar: bytes
    index: bytes
    location: str = "/made-up"
    identity: str = "as written"
    opens: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)

    def open(self, name: str) -> Bytes:
        kind = "index" if name.endswith(INDEX_SUFFIX) else "tar"
        self.opens[kind] += 1
        return _MadeUpFile(self, kind, self.index if kind == "index" else self.tar)

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        raise FileNotFoundError(name)

    def prefetch(self, ranges: Iterable[tuple[Bytes, int, int]]) -> None:
        pass

    def sibling(self, path: str) -> Folder:
        return self


class _MadeUpFile:
    def __init__(self, folder: _MadeUpFolder, kind: str, data: bytes) -> None:
        self._folder, self._kind, self._data = folder, kind, memoryview(data)
        self.size = len(data)
        self.identity: object = folder.identity

    def read(self, start: int, length: int) -> memoryview:
        self._folder.read[self._kind] += length
        return self._data[start : start + length]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Manifest, _MadeUpFolder]]:
    """A split of so many shards of 512 sequences, and its folder."""
    path = tmp_path_factory.mktemp("made-up") / "a.tar"
    shard = write_shard(path, random_sequences(512, seed=0, sequence=4), dtype="uint16")
    content = path.read_bytes(), path.with_name(path.name + INDEX_SUFFIX).read_bytes()

    def make(shards: int) -> tuple[Manifest, _MadeUpFolder]:
        rows = np.repeat(ShardTable.of([shard])._rows_P, shards)
        manifest = _manifest(ShardTable(rows, NamePattern("shard-", 5, ".tar", 0)), sequence_length=4, vocab_size=500)
        folder = _MadeUpFolder(*content)
        return manifest.lying_in(folder), folder

    return make


def _replay(manifest: Manifest, reader: SequenceReader, *, world: int, slots: range, batch: int = 2048) -> int:
    """Reads the rows of rank 0 in the order of the stream, a global batch at a time; returns their number."""
    order = Mixture.of(manifest).order(seed=0)
    rows = batch // world
    for start in range(slots.start, slots.stop, batch):
        read = reader.read(order.locate(np.arange(start, start + rows))[:, 1:])
        assert not read.faults
    return -(-len(slots) // batch) * rows


def test_a_rank_opens_a_shard_once_a_window_and_not_again(
    made_up: Callable[[int], tuple[Manifest, _MadeUpFolder]],
) -> None:
    """A window of 65,536 sequences lies in 1,024 blocks, which 64 open shards could not hold."""
    manifest, folder = made_up(1500)
    rows = _replay(manifest, SequenceReader(manifest), world=8, slots=range(3 * 64 * WINDOW))
    assert rows == 24_576
    assert folder.opens["tar"] <= len(manifest.shards)
    assert folder.opens["index"] / rows < 0.1
    assert folder.read["index"] == folder.opens["index"] * len(folder.index)


@pytest.mark.thorough
@pytest.mark.parametrize(("world", "shards", "sequences"), [(1, 1000, 2**17), (8, 1000, 2**19), (64, 1000, 2**22)])
def test_opens_a_row_are_below_a_tenth(
    made_up: Callable[[int], tuple[Manifest, _MadeUpFolder]], world: int, shards: int, sequences: int
) -> None:
    """It was 0.93 to 0.99 for any world and any number of shards with 64 open ones."""
    manifest, folder = made_up(shards)
    rows = _replay(manifest, SequenceReader(manifest), world=world, slots=range(sequences))
    assert folder.opens.total() / rows < 0.1
    assert folder.read["index"] <= shards * len(folder.index)


def test_an_index_that_was_dropped_is_not_read_whole_again(
    made_up: Callable[[int], tuple[Manifest, _MadeUpFolder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More shards than memory holds: what is read again of a verified index is the entry of each row."""
    manifest, folder = made_up(200)
    monkeypatch.setattr(shard_cache, "MAX_REMOTE_FILES", 10)
    cache = ShardCache(index_bytes=20 * len(folder.index) // 6)
    reader = SequenceReader(manifest, cache)
    _replay(manifest, reader, world=32, slots=range(200 * 512))  # about 3,200 rows: every shard is met
    assert folder.read["index"] >= len(manifest.shards) * len(folder.index)
    folder.read.clear()
    folder.opens.clear()
    rows = _replay(manifest, reader, world=32, slots=range(200 * 512, 2 * 200 * 512))
    assert folder.read["index"] <= 56 * rows
    assert folder.opens.total() <= 2 * rows
    assert 0 < cache.indices.total <= 20 * len(folder.index) // 6


def test_a_changed_index_is_verified_again(made_up: Callable[[int], tuple[Manifest, _MadeUpFolder]]) -> None:
    manifest, folder = made_up(3)
    reader = SequenceReader(manifest, ShardCache(index_bytes=0))
    places = np.array([[1, 5]])
    for _ in range(2):
        assert not reader.read(places).faults
    assert folder.read["index"] == len(folder.index) + 56, "the second time it was known, and not in memory"
    damaged = bytearray(folder.index)
    damaged[-60] ^= 1
    folder.index, folder.identity = bytes(damaged), "changed"
    reader = SequenceReader(manifest, ShardCache(index_bytes=0))
    assert "expected the index with sha256" in str(reader.read(places).faults[0])


def test_ranks_of_a_node_and_later_starts_know_what_one_has_verified(
    made_up: Callable[[int], tuple[Manifest, _MadeUpFolder]],
) -> None:
    manifest, folder = made_up(1100)
    _replay(manifest, SequenceReader(manifest), world=64, slots=range(2**18))  # 8,192 rows
    seen = folder.read.pop("index") // len(folder.index)
    assert seen > 1000
    rows = _replay(manifest, SequenceReader(manifest), world=64, slots=range(2**18))
    assert folder.read["index"] == 56 * rows, "an entry a row, of no index the whole"
    assert folder.opens["index"] <= 2 * len(manifest.shards)
    folder.identity = "changed"
    read = SequenceReader(manifest).read(Mixture.of(manifest).order(seed=0).locate(np.arange(1))[:, 1:])
    assert not read.faults
    assert folder.read["index"] == 56 * rows + len(folder.index)
