"""The index of a token file: where its ids lie, a crc32 for each sequence, and where documents begin.

It is an .npy of one row of int64: G, D, the segments' begins [G] and ends [G], the crc32 of each sequence [Q], the
documents' starts [D]. Begins are bytes of the file, or numbers of parts that are decoded; ends and starts are places in
the stream of ids. Sequence i is the S + 1 ids from place i·S on. A local index is mapped, a remote one copied to this
node, where its processes map it.

Legend: G segments, D documents, Q sequences, S tokens of a sequence; n of a part of one of these.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import Manifest, TokenFileFormat
from megadistill.data.shards.npy import npy_header_of
from megadistill.data.shards.opening import ShardFault
from megadistill.data.shards.shard import Shard
from megadistill.data.storage.base import Bytes, Folder
from megadistill.data.storage.local import LocalFolder
from megadistill.data.storage.node_files import open_copy
from megadistill.io import atomic_write

HEADER_BYTES: Final = 128
"""Length of the .npy header of one row."""
COUNTS: Final = 2
ITEM: Final = 8
MAX_IDS: Final = 1 << 50
"""Most ids of a file."""
CHECKED_AT_A_TIME: Final = 1 << 16
"""Numbers of a column: each rank checks it, and 10^9 at once would take some times their 8 GB in each."""

Column = NDArray[np.int64]


@dataclass(frozen=True)
class TokenIndex:
    """The index of one file."""

    begins_G: Column
    """The byte where a segment begins, or the number of a part."""
    ends_G: Column
    """The place behind a segment's last id."""
    crc32_Q: Column
    """Over the bytes of a sequence's ids, as stored; of decoded ids, little-endian in the manifest's dtype for them."""
    starts_D: Column
    """Places where documents begin, climbing."""

    @classmethod
    def of_segments(cls, segments_G2: Column, crc32_Q: Column, starts_D: Column) -> Self:
        """`segments_G2`: begin and number of ids of each segment."""
        return cls(segments_G2[:, 0], np.cumsum(segments_G2[:, 1]), crc32_Q, starts_D)

    def write(self, path: Path) -> None:
        """Writes the .npy, whole or not at all."""
        columns = (self.begins_G, self.ends_G, self.crc32_Q, self.starts_D)
        counts = np.array([len(self.begins_G), len(self.starts_D)])
        with atomic_write(path) as file:
            file.write(npy_header_of((COUNTS + sum(map(len, columns)),), "<i8"))
            for column in (counts, *columns):
                file.write(np.ascontiguousarray(column, dtype="<i8").data)

    @classmethod
    def parse(cls, data: memoryview, sequences: int) -> Self:
        """The columns in the bytes of an index, not copied. Raises ValueError: they are not those of an index."""
        count = (len(data) - HEADER_BYTES) // ITEM
        header = npy_header_of((count,), "<i8")
        if len(data) != HEADER_BYTES + count * ITEM or data[:HEADER_BYTES] != header:
            raise ValueError(f"expected an .npy of one row of int64, found {bytes(data[:80])!r}")
        values = np.frombuffer(data, dtype="<i8", offset=HEADER_BYTES)
        segments, documents = values[:COUNTS].tolist()
        if segments < 1 or documents < 0 or COUNTS + 2 * segments + sequences + documents != count:
            raise ValueError(
                f"expected {count} numbers, found the counts of {segments} segments, {sequences} sequences and "
                f"{documents} documents"
            )
        ends = np.cumsum([COUNTS, segments, segments, sequences]).tolist()
        return cls(*(values[a:b] for a, b in zip(ends, [*ends[1:], count], strict=True)))

    def require_sound(self, *, sequence_length: int, file_bytes: int, itemsize: int | None) -> None:
        """`itemsize` of the ids in the file; None: parts are decoded. Raises ValueError: a value makes no sense."""
        for first, before_n, ends_n in _parts(self.ends_G, least=0):
            climbs_n = (ends_n > before_n) & (ends_n <= MAX_IDS)
            _require(climbs_n, ends_n, first, "segment", "places that climb")
            begins_n, counts_n = self.begins_G[first : first + len(ends_n)], ends_n - before_n
            if itemsize is None:
                _require(begins_n >= 0, begins_n, first, "segment", "the number of a part")
                continue
            # The first two keep the sum from overflowing.
            inside_n = (begins_n >= 0) & (begins_n <= file_bytes) & (counts_n <= file_bytes)
            inside_n &= begins_n + np.where(inside_n, counts_n, 0) * itemsize <= file_bytes
            _require(inside_n, begins_n, first, "segment", f"a range that ends before byte {file_bytes}")
        ids, sequences = int(self.ends_G[-1]), len(self.crc32_Q)
        if (ids - 1) // sequence_length != sequences:
            raise ValueError(f"expected {sequences} sequences of {sequence_length + 1} ids, found {ids} ids")
        for first, _, crc32_n in _parts(self.crc32_Q, least=0):
            _require((crc32_n >= 0) & (crc32_n < 1 << 32), crc32_n, first, "sequence", "a crc32")
        for first, before_n, starts_n in _parts(self.starts_D, least=-1):
            climbs_n = (starts_n > before_n) & (starts_n < ids)
            _require(climbs_n, starts_n, first, "document", f"places that climb, below {ids}")


def _parts(column: Column, *, least: int) -> Iterator[tuple[int, Column, Column]]:
    """Parts of a column: number of the first value, the value before each one (`least` before them all), the values."""
    for first in range(0, len(column), CHECKED_AT_A_TIME):
        values_n = column[first : first + CHECKED_AT_A_TIME]
        yield first, np.append(column[first - 1] if first else least, values_n[:-1]), values_n


def _require(holds_n: NDArray[np.bool_], values_n: Column, first: int, what: str, expected: str) -> None:
    if not holds_n.all():
        place = int(holds_n.argmin())
        raise ValueError(f"{what} {first + place}: expected {expected}, found {values_n[place]}")


def open_index(folder: Folder, manifest: Manifest, record: TokenFileFormat, shard: Shard) -> Bytes:
    """The file of the index of `shard`; its size is possible, no more is checked.

    Raises:
        ShardFault: it is missing or unreachable, or has an impossible size.
    """
    path = f"{folder.location}/{shard.index}"
    most = shard.bytes if record.decoder is None else MAX_IDS  # ids of a file, of which each has a byte at least
    segments, documents = min(record.segments, most), min(manifest.documents or 0, most)
    numbers = COUNTS + 2 * segments + shard.sequences + documents
    try:
        file: Bytes = folder.open(shard.index)
        if file.size > HEADER_BYTES + numbers * ITEM:
            raise ShardFault(f"{path}: expected {HEADER_BYTES + numbers * ITEM} bytes at most, found {file.size}")
        if not isinstance(folder, LocalFolder):
            file = open_copy(folder, shard.index, size=file.size, sha256=shard.index_sha256)
    except OSError as error:
        raise ShardFault(f"{path}: expected the index of {shard.name}, found: {error.strerror or error}") from None
    return file


def index_of(
    file: Bytes, folder: Folder, manifest: Manifest, record: TokenFileFormat, shard: Shard, *, verified: bool
) -> TokenIndex:
    """The index in the `file` of `open_index`. `verified`: this very file was verified before.

    Raises:
        ShardFault: it cannot be read, is another one, or impossible.
    """
    path = f"{folder.location}/{shard.index}"
    try:
        data = file.read(0, file.size)
    except OSError as error:
        raise ShardFault(f"{path}: expected the index of {shard.name}, found: {error.strerror or error}") from None
    if not verified and (digest := hashlib.sha256(data).hexdigest()) != shard.index_sha256:
        raise ShardFault(
            f"{path}: expected the index with sha256 {shard.index_sha256[:12]}…, found one with {digest[:12]}…"
        )
    try:
        index = TokenIndex.parse(data, shard.sequences)
        if not verified:
            index.require_sound(
                sequence_length=manifest.sequence_length,
                file_bytes=shard.bytes,
                itemsize=None if record.decoder else stored(record).itemsize,
            )
    except ValueError as error:
        raise ShardFault(f"{path}: {error}") from None
    return index


def stored(record: TokenFileFormat) -> np.dtype[Any]:
    """dtype of the ids in the files."""
    return np.dtype(record.dtype).newbyteorder("<")
