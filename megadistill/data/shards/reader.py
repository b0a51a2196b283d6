"""Reading: places in a split to units, each checked before anybody sees it. It knows no slots and no order.

The shards are somebody else's bytes. A shard is checked when it is opened (its size, the sha256 of its index, the
ranges in it), a unit each time it is read (crc32, array headers, ids, bounds). What does not hold is reported for the
unit that it damages, and changes no other.

Legend: N places asked for, S tokens of a sequence, U units of a shard, D documents of a unit.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from megadistill.data.shards.manifest import Manifest, Shard
from megadistill.data.shards.npy import Misfit, Row, npy_header_of, npy_row, row_of
from megadistill.data.shards.tar import MAX_UNIT_BYTES, Column, Index
from megadistill.data.storage.base import Bytes
from megadistill.errors import OperatorFault

OPEN_SHARDS: Final = 64
"""Shards kept open at a time; where they are mapped, they cost address space."""
HEADER_BYTES: Final = 128
"""Of the .npy that numpy writes for a row of integers."""
KNOWN_HEADERS: Final = 4096
"""Of bounds members, kept with the number of bounds that each announces."""

Places = NDArray[np.int64]
Tokens = NDArray[np.unsignedinteger[Any]]
Packed = memoryview | bytes
"""Bounds [D + 1] as little-endian uint32."""


class ShardFault(OperatorFault):
    """A shard does not hold what its manifest says. One line: where, what was expected, what was found."""


@dataclass(frozen=True)
class Units:
    """Units, a row each. A row that is a fault has tokens of zero and one document."""

    tokens: Tokens
    """[N, S + 1], in the manifest's dtype."""
    bounds: list[NDArray[np.int64]]
    """N arrays [D + 1], see `rows`; [0, S + 1] where the manifest knows none."""
    faults: dict[int, ShardFault]
    """By row."""


@dataclass(frozen=True)
class OpenShard:
    """A shard whose size and index are what the manifest says."""

    path: str
    file: Bytes
    rows_U7: Index

    def fault(self, unit: int, message: str) -> ShardFault:
        return ShardFault(f"{self.path} unit {unit} at byte {self.rows_U7[unit, Column.START]}: {message}")


def open_shard(manifest: Manifest, number: int) -> OpenShard:
    """Opens shard `number` of `manifest`.

    Raises:
        ShardFault: a file is missing or out of reach, the size or the index is not the manifest's.
    """
    shard = manifest.shards[number]
    path = f"{manifest.folder.location}/{shard.name}"
    rows_U7 = _index(manifest, shard, path)
    try:
        file = manifest.folder.open(shard.name)
    except OSError as error:
        raise ShardFault(f"{path}: expected a file of {shard.bytes} bytes, found: {error.strerror or error}") from None
    if file.size != shard.bytes:
        raise ShardFault(f"{path}: expected {shard.bytes} bytes, found {file.size}")
    return OpenShard(path, file, rows_U7)


def _index(manifest: Manifest, shard: Shard, tar: str) -> Index:
    path = f"{manifest.folder.location}/{shard.index}"
    expected = len(_table_header(shard)) + shard.units * len(Column) * 8
    try:
        file = manifest.folder.open(shard.index)
        if file.size != expected:
            raise ShardFault(f"{path}: expected {expected} bytes, found {file.size}")
        data = file.read(0, file.size)
    except OSError as error:
        raise ShardFault(f"{path}: expected the index of {tar}, found: {error.strerror or error}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.index_sha256:
        raise ShardFault(
            f"{path}: expected the index with sha256 {shard.index_sha256[:12]}…, found one with {digest[:12]}…"
        )
    rows_U7 = _table(data, shard, path)
    wrong = _unsound(rows_U7, shard, with_bounds=manifest.unit.bounds is not None)
    if wrong is not None:
        unit, what = wrong
        raise ShardFault(f"{path} unit {unit}: expected {what}, found {rows_U7[unit].tolist()}")
    return rows_U7


def _table(data: memoryview, shard: Shard, path: str) -> Index:
    """[U, 7] int64, not copied."""
    header = _table_header(shard)
    if data[: len(header)] != header:
        raise ShardFault(
            f"{path}: expected an .npy of ({shard.units}, {len(Column)}) int64, found {bytes(data[:100])!r}"
        )
    return np.frombuffer(data, dtype="<i8", offset=len(header)).reshape(shard.units, len(Column))


def _table_header(shard: Shard) -> bytes:
    return npy_header_of((shard.units, len(Column)), "<i8")


def _unsound(rows_U7: Index, shard: Shard, *, with_bounds: bool) -> tuple[int, str] | None:
    """The first unit whose ranges are impossible, and what they should be."""
    start, length, crc32, tokens_at, tokens_bytes, bounds_at, bounds_bytes = rows_U7.T
    sizes_U6 = np.delete(rows_U7, Column.CRC32, axis=1)
    checks = (  # the first two keep the sums of the others from overflowing
        ((sizes_U6 >= 0).all(axis=1) & (sizes_U6 <= shard.bytes).all(axis=1), f"places in {shard.bytes} bytes"),
        ((crc32 >= 0) & (crc32 < 1 << 32), "a crc32"),
        ((length > 0) & (length <= MAX_UNIT_BYTES), f"at most {MAX_UNIT_BYTES} bytes"),
        (start == np.append(0, (start + length)[:-1]), "units that touch each other"),
        (start + length <= shard.bytes, f"a range that ends before byte {shard.bytes}"),
        ((tokens_bytes > 0) & (tokens_at + tokens_bytes <= length), "a tokens member inside the unit"),
        (bounds_at + bounds_bytes <= length, "a bounds member inside the unit"),
        ((bounds_bytes > 0) == with_bounds, "a bounds member" if with_bounds else "no bounds member"),
    )
    for holds_U, what in checks:
        if not holds_U.all():
            return int(holds_U.argmin()), what
    return None


@dataclass(frozen=True)
class _Group:
    """The rows of a batch that lie in one shard, and what its index says of each."""

    shard: OpenShard
    rows: list[int]
    units: list[int]
    entries: list[list[int]]


class UnitReader:
    """Units of one split by their places. Keeps OPEN_SHARDS shards open; one thread at a time."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._length = manifest.sequence_length + 1
        self._dtype = np.dtype(manifest.dtype)
        self._record = manifest.unit
        self._header = _plain_header(manifest)
        self._counts: dict[bytes, int] = {}
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._broken: dict[int, ShardFault] = {}

    def read(self, places_N2: Places) -> Units:
        """The units at `places_N2` [N, 2] int64: shard, and unit in the shard. Faults are reported, not raised."""
        places_N2 = np.asarray(places_N2, dtype=np.int64)
        tokens_NU = np.zeros((len(places_N2), self._length), dtype=self._dtype)
        packed: dict[int, Packed] = {}
        faults: dict[int, ShardFault] = {}
        groups = self._groups(places_N2, faults)
        self._manifest.folder.prefetch(
            (group.shard.file, start, length) for group in groups for start, length, *_ in group.entries
        )
        for group in groups:
            faults |= self._copy(group, tokens_NU, packed)
        bounds, wrong = _unpacked(packed, rows=len(places_N2), length=self._length)
        wrong |= self._large_ids(tokens_NU)
        for group in groups if wrong else ():
            at_fault = ((row, unit) for row, unit in zip(group.rows, group.units, strict=True) if row in wrong)
            faults |= {row: group.shard.fault(unit, wrong[row]) for row, unit in at_fault if row not in faults}
        for row in faults:
            tokens_NU[row] = 0
            bounds[row] = np.array([0, self._length])
        return Units(tokens_NU, bounds, faults)

    def _groups(self, places_N2: Places, faults: dict[int, ShardFault]) -> list[_Group]:
        """The rows of each shard that opens; the others are faults."""
        order_N = np.argsort(places_N2[:, 0], kind="stable")
        shards_N, units_N = places_N2[order_N].T
        edges = np.flatnonzero(np.diff(shards_N, prepend=-1, append=-1)).tolist()
        groups = []
        for first, stop in pairwise(edges):
            rows, units_n = order_N[first:stop].tolist(), units_N[first:stop]
            shard = self._shard(int(shards_N[first]))
            if isinstance(shard, ShardFault):
                faults.update(dict.fromkeys(rows, shard))
            else:
                groups.append(_Group(shard, rows, units_n.tolist(), shard.rows_U7[units_n].tolist()))
        return groups

    def _shard(self, number: int) -> OpenShard | ShardFault:
        """Opened once; what does not open is not tried again."""
        if number in self._broken:
            return self._broken[number]
        shard = self._open.get(number)
        if shard is None:
            try:
                shard = open_shard(self._manifest, number)
            except ShardFault as fault:
                self._broken[number] = fault
                return fault
            self._open[number] = shard
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard

    def _copy(self, group: _Group, tokens_NU: Tokens, packed: dict[int, Packed]) -> dict[int, ShardFault]:
        """The hot loop: copies the tokens of each unit whose crc32 holds into its row, and its bounds into `packed`.

        Nearly every member begins with the very bytes that numpy writes for it; the others are parsed. isal's crc32 is
        zlib's, in an eighth of the time.
        """
        read, crc32, counts = group.shard.file.read, isal_zlib.crc32, self._counts
        flat, width = tokens_NU.data.cast("B"), tokens_NU.strides[0]
        header, begin = self._header, len(self._header or b"")
        faults: dict[int, ShardFault] = {}
        for row, unit, entry in zip(group.rows, group.units, group.entries, strict=True):
            start, length, crc, tokens_at, tokens_bytes, bounds_at, bounds_bytes = entry
            try:
                data = read(start, length)
                if crc32(data) != crc:
                    raise Misfit(f"expected crc32 {crc:#010x}, found {crc32(data):#010x}")
                numbers_at = tokens_at + begin
                if tokens_bytes == begin + width and bytes(data[tokens_at:numbers_at]) == header:
                    flat[row * width : (row + 1) * width] = data[numbers_at : numbers_at + width]
                else:
                    tokens_NU[row] = self._parsed(data[tokens_at : tokens_at + tokens_bytes])
                if bounds_bytes:
                    numbers_at, stop = bounds_at + HEADER_BYTES, bounds_at + bounds_bytes
                    count = counts.get(bytes(data[bounds_at:numbers_at]))
                    if count is not None and stop == numbers_at + 4 * count:
                        packed[row] = data[numbers_at:stop]
                    else:
                        packed[row] = self._parsed_bounds(data[bounds_at:stop])
            except Misfit as misfit:
                faults[row] = group.shard.fault(unit, str(misfit))
            except OSError as error:
                faults[row] = group.shard.fault(unit, f"expected {length} bytes, found: {error.strerror or error}")
        return faults

    def _parsed_bounds(self, data: memoryview) -> bytes:
        """[D + 1] uint32, of a member whose header has not been seen before or is an unusual one."""
        row = npy_row(data)
        if len(row) < 2 or row.min() < 0 or row.max() > self._length:
            raise Misfit(f"{_climbing(self._length)}, found {_short(row)}")
        header = npy_header_of(row.shape, "<u4")
        if len(self._counts) < KNOWN_HEADERS and len(header) == HEADER_BYTES and data[:HEADER_BYTES] == header:
            self._counts[header] = len(row)
        return row.astype("<u4").tobytes()

    def _parsed(self, data: memoryview) -> Row:
        """[S + 1], in a dtype that may be wider than the manifest's; each id fits into that."""
        row = row_of(data, self._record, dtype=self._manifest.dtype, length=self._length)
        if row.min() < 0 or row.max() >= self._manifest.vocab_size:
            raise Misfit(_ids_below(self._manifest.vocab_size, row.min() if row.min() < 0 else row.max()))
        return row

    def _large_ids(self, tokens_NU: Tokens) -> dict[int, str]:
        """What is wrong with each row that has an id past the vocabulary."""
        vocab_size = self._manifest.vocab_size
        if tokens_NU.size == 0 or tokens_NU.max() < vocab_size:
            return {}
        largest_N = tokens_NU.max(axis=1)
        return {row: _ids_below(vocab_size, largest_N[row]) for row in np.flatnonzero(largest_N >= vocab_size).tolist()}


def _ids_below(vocab_size: int, found: Any) -> str:
    return f"expected ids from 0 to {vocab_size - 1}, found {found}"


def _plain_header(manifest: Manifest) -> bytes | None:
    """What a tokens member begins with when there is nothing to parse; None: there always is."""
    if manifest.unit.kind == "npy":
        return npy_header_of((manifest.sequence_length + 1,), np.dtype(manifest.dtype).newbyteorder("<").str)
    return b"" if manifest.unit.kind == "raw" else None


def _unpacked(packed: dict[int, Packed], *, rows: int, length: int) -> tuple[list[NDArray[np.int64]], dict[int, str]]:
    """The bounds of each row, and what is wrong with those that do not climb from 0 to `length` at most."""
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
