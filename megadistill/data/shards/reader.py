"""Reading the sequences of a split by their places, each one checked.

Shards are untrusted input. A shard is checked when it is opened (its size, the sha256 of its index, the ranges in it),
a sequence each time it is read (crc32, array headers, ids, bounds). A fault is reported for the sequence that it
damages, and changes no other.

Legend: N places to read, T = S + 1 tokens of a sequence, Q sequences of a shard, D documents of a sequence.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import Manifest, SampleFormat, TokenFileFormat
from megadistill.data.shards.npy import MemberError, Row, npy_header_of, npy_row, row_of
from megadistill.data.shards.opening import OpenShard, ShardFault, open_indexed_tar
from megadistill.data.shards.sequence_batch import Places, SequenceBatch, Tokens, by_shard, ids_below, with_faults
from megadistill.data.shards.shard_cache import CachedShard, FileIndex, ShardCache
from megadistill.data.shards.token_files.token_file import TokenFile, open_token_file
from megadistill.data.shards.token_files.token_file_reader import TokenFileReader

HEADER_BYTES: Final = 128
"""Length of the .npy header that numpy writes for a row of integers."""
KNOWN_HEADERS: Final = 4096
"""Headers of bounds members that are remembered, with the number of bounds that each announces."""
WHOLE_SHARD_BATCH: Final = 256
"""Sequences read at a time by `read_shard`."""

PackedBounds = memoryview | bytes
"""Bounds [D + 1] as little-endian uint32."""


def open_shard(manifest: Manifest, number: int) -> OpenShard | TokenFile:
    """Shard `number` of a split.

    Raises:
        ShardFault: a file is missing or unreachable, the size or the index is not the manifest's.
    """
    record = manifest.sample_format
    if isinstance(record, TokenFileFormat):
        return open_token_file(manifest, record, number)
    members = {"tokens": True, "bounds": record.has_documents}
    return open_indexed_tar(manifest.folder, manifest.shards[number], members)


_Group = tuple[CachedShard, dict[int, int], list[list[int]]]
"""A shard; row of a batch -> its sequence in that shard; the sequences' entries in the index."""


class SequenceReader:
    """Sequences of one split by their places; one thread at a time."""

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None) -> None:
        """`cache` bounds what several readers keep open, together."""
        self._manifest = manifest
        record, cache = manifest.sample_format, cache or ShardCache()
        self._reader: TokenFileReader | _TarReader = (
            TokenFileReader(manifest, record, cache)
            if isinstance(record, TokenFileFormat)
            else _TarReader(manifest, record, cache)
        )

    def read(self, places_N2: Places) -> SequenceBatch:
        """The sequences at `places_N2` [N, 2] int64: shard, and sequence in it. Faults are reported, not raised."""
        return self._reader.read(np.asarray(places_N2, dtype=np.int64))

    def read_shard(self, number: int) -> Iterator[SequenceBatch]:
        """All sequences of shard `number` in order, WHOLE_SHARD_BATCH at a time."""
        count = self._manifest.shards[number].sequences
        for first in range(0, count, WHOLE_SHARD_BATCH):
            sequences = np.arange(first, min(first + WHOLE_SHARD_BATCH, count))
            yield self.read(np.stack([np.full_like(sequences, number), sequences], axis=1))


class _TarReader:
    """Sequences of a split of tars; one thread at a time."""

    def __init__(self, manifest: Manifest, record: SampleFormat, cache: ShardCache) -> None:
        self._manifest, self._record = manifest, record
        self._length = manifest.sequence_length + 1
        self._dtype = np.dtype(manifest.dtype)
        self._header = _plain_header(manifest, record)
        self._counts: dict[bytes, int] = {}
        self._shards = cache.split(manifest)
        self._broken: dict[int, ShardFault] = {}

    def read(self, places_N2: Places) -> SequenceBatch:
        tokens_NT = np.zeros((len(places_N2), self._length), dtype=self._dtype)
        packed: dict[int, PackedBounds] = {}
        faults: dict[int, ShardFault] = {}
        groups = self._groups(places_N2, faults)
        self._manifest.folder.prefetch(
            (shard.file, start, length) for shard, _, entries in groups for start, length, *_ in entries
        )
        wrong: dict[int, str] = {}
        for group in groups:
            wrong |= self._copy(group, tokens_NT, packed)
        bounds, unsound = _unpacked(packed, rows=len(places_N2), length=self._length)
        wrong = unsound | self._large_ids(tokens_NT) | wrong
        for shard, sequences, _ in groups if wrong else ():
            for row in wrong.keys() & sequences:
                at = f"{shard.path} sequence {sequences[row]} at byte {shard.index.rows([sequences[row]])[0][0]}"
                faults[row] = ShardFault(f"{at}: {wrong[row]}")
        return with_faults(tokens_NT, bounds, faults)

    def _groups(self, places_N2: Places, faults: dict[int, ShardFault]) -> list[_Group]:
        """The rows of each shard that opens; the others are faults."""
        opened = []
        for number, sequences in by_shard(places_N2).items():
            shard = self._shard(number)
            if isinstance(shard, ShardFault):
                faults.update(dict.fromkeys(sequences, shard))
            else:
                opened.append((shard, sequences))
        self._manifest.folder.prefetch(
            place
            for shard, sequences in opened
            if isinstance(shard.index, FileIndex)
            for place in shard.index.ranges(list(sequences.values()))
        )
        groups = []
        for shard, sequences in opened:
            try:
                groups.append((shard, sequences, shard.index.rows(list(sequences.values()))))
            except OSError as error:
                fault = ShardFault(f"{shard.path}: expected entries of its index, found: {error.strerror or error}")
                faults.update(dict.fromkeys(sequences, fault))
        return groups

    def _shard(self, number: int) -> CachedShard | ShardFault:
        """One that does not open is not tried again."""
        if number not in self._broken:
            try:
                return self._shards.get(number)
            except ShardFault as fault:
                self._broken[number] = fault
        return self._broken[number]

    def _copy(self, group: _Group, tokens_NT: Tokens, packed: dict[int, PackedBounds]) -> dict[int, str]:
        """The hot loop: copies the tokens of each intact sequence into its row, and its bounds into `packed`.

        Nearly every member begins with exactly the bytes that numpy writes for it; the others are parsed. Returns
        row -> message for each damaged one.
        """
        shard, sequences, entries = group
        counts = self._counts
        flat, width = tokens_NT.data.cast("B"), tokens_NT.strides[0]
        header, begin = self._header, len(self._header or b"")
        wrong: dict[int, str] = {}
        for row, entry in zip(sequences, entries, strict=True):
            start, length, crc, tokens_at, tokens_bytes, bounds_at, bounds_bytes = entry
            try:
                data = shard.sample(start, length, crc)
                numbers_at = tokens_at + begin
                if tokens_bytes == begin + width and bytes(data[tokens_at:numbers_at]) == header:
                    flat[row * width : (row + 1) * width] = data[numbers_at : numbers_at + width]
                else:
                    tokens_NT[row] = self._parsed(data[tokens_at : tokens_at + tokens_bytes])
                if bounds_bytes:
                    numbers_at, stop = bounds_at + HEADER_BYTES, bounds_at + bounds_bytes
                    count = counts.get(bytes(data[bounds_at:numbers_at]))
                    if count is not None and stop == numbers_at + 4 * count:
                        packed[row] = data[numbers_at:stop]
                    else:
                        packed[row] = self._parsed_bounds(data[bounds_at:stop])
            except MemberError as error:
                wrong[row] = str(error)
        return wrong

    def _parsed_bounds(self, data: memoryview) -> bytes:
        """[D + 1] uint32, of a member whose header has not been seen before or is an unusual one."""
        row = npy_row(data)
        if len(row) < 2 or row.min() < 0 or row.max() > self._length:
            raise MemberError(f"{_climbing(self._length)}, found {_short(row)}")
        header = npy_header_of(row.shape, "<u4")
        if len(self._counts) < KNOWN_HEADERS and len(header) == HEADER_BYTES and data[:HEADER_BYTES] == header:
            self._counts[header] = len(row)
        return row.astype("<u4").tobytes()

    def _parsed(self, data: memoryview) -> Row:
        """[T], in a dtype that may be wider than the manifest's; each id fits into that."""
        row = row_of(data, self._record, dtype=self._manifest.dtype, length=self._length)
        if row.min() < 0 or row.max() >= self._manifest.vocab_size:
            raise MemberError(ids_below(self._manifest.vocab_size, row.min() if row.min() < 0 else row.max()))
        return row

    def _large_ids(self, tokens_NT: Tokens) -> dict[int, str]:
        """Row -> message, for each row that has an id past the vocabulary."""
        vocab_size = self._manifest.vocab_size
        if tokens_NT.size == 0 or tokens_NT.max() < vocab_size:
            return {}
        largest_N = tokens_NT.max(axis=1)
        return {row: ids_below(vocab_size, largest_N[row]) for row in np.flatnonzero(largest_N >= vocab_size).tolist()}


def _plain_header(manifest: Manifest, record: SampleFormat) -> bytes | None:
    """The bytes before the ids of a tokens member that need no parsing; None: every member needs it."""
    if record.kind == "npy":
        return npy_header_of((manifest.sequence_length + 1,), np.dtype(manifest.dtype).newbyteorder("<").str)
    return b"" if record.kind == "raw" else None


def _unpacked(
    packed: dict[int, PackedBounds], *, rows: int, length: int
) -> tuple[list[NDArray[np.int64]], dict[int, str]]:
    """The bounds of each row, and a message for each row whose bounds do not climb from 0 to `length` at most."""
    bounds = [np.array([0, length])] * rows
    if not packed:
        return bounds, {}
    values = np.frombuffer(b"".join(packed.values()), dtype="<u4").astype(np.int64)
    stops_n = np.cumsum([len(part) for part in packed.values()]) // 4
    starts_n = np.append(0, stops_n[:-1])
    for row, start, stop in zip(packed, starts_n.tolist(), stops_n.tolist(), strict=True):
        bounds[row] = values[start:stop]
    steps = np.diff(values)
    steps[stops_n[:-1] - 1] = 1  # from one row to the next
    unsound_n = (values[starts_n] != 0) | (values[stops_n - 1] > length)
    unsound_n[np.searchsorted(stops_n, np.flatnonzero(steps <= 0), side="right")] = True
    unsound = [row for row, is_unsound in zip(packed, unsound_n.tolist(), strict=True) if is_unsound]
    return bounds, {row: f"{_climbing(length)}, found {_short(bounds[row])}" for row in unsound}


def _climbing(length: int) -> str:
    return f"expected bounds that climb from 0 to {length} at most"


def _short(values: Row) -> str:
    text = ", ".join(map(str, values[:8].tolist()))
    return f"[{text}{', …' if len(values) > 8 else ''}]"
