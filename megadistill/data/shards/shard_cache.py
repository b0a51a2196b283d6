"""Open shards of the splits that a process reads, and their verified indices.

The rows of one rank lie in other shards from window to window. A shard's index is read and verified when its first row
is read on this node, and never again while the file stays the same, also by a later start. It is kept packed, within
bytes; of one that is not in memory only the entries that are needed are read. A tar that was closed is opened again,
and has its size compared.

Legend: P shards, Q sequences of a shard, C columns of an index.
"""

import hashlib
import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import Manifest
from megadistill.data.shards.opening import index_file, open_shard_file, read_sample, verified_index
from megadistill.data.shards.tar import Index
from megadistill.data.storage.base import Bytes
from megadistill.data.storage.local import LocalFolder
from megadistill.data.storage.node_files import shared_array

MAX_OPEN_FILES: Final = 4096
"""Local files that stay open: tar and index of a window's 1,024 blocks, each of which may lie in two shards."""
MAX_REMOTE_FILES: Final = 1 << 16
"""Remote files whose size stays known."""
INDEX_BYTES: Final = 256 << 20
"""Memory of packed indices: 12 bytes a sequence mostly, so those of 1,200 shards of 18,000 sequences."""
MIN_SHARED: Final = 1024
"""Shards from which on the processes of a node share which indices were verified."""
ITEM: Final = 8

_FileKey = tuple[int, str, int]
"""A split, "tar" or "index", and the number of a shard."""
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class PackedIndex:
    """A verified index in memory: columns with one value take none, the others their narrowest type."""

    def __init__(self, index: Index) -> None:
        most_C = index.max(axis=0)
        self._template_C = index.min(axis=0)
        varying = np.flatnonzero(self._template_C != most_C).tolist()
        self._columns = [(column, index[:, column].astype(np.min_scalar_type(most_C[column]))) for column in varying]

    @property
    def bytes(self) -> int:
        return sum(values_Q.nbytes for _, values_Q in self._columns)

    def rows(self, sequences: Sequence[int]) -> list[list[int]]:
        """The entries of `sequences`."""
        rows_NC = np.empty((len(sequences), len(self._template_C)), dtype=np.int64)
        rows_NC[:] = self._template_C
        for column, values_Q in self._columns:
            rows_NC[:, column] = values_Q[sequences]
        rows: list[list[int]] = rows_NC.tolist()
        return rows


@dataclass(frozen=True)
class FileIndex:
    """An index that was verified and is no longer in memory: its file, of which single entries are read."""

    file: Bytes
    begin: int
    """Byte of the first entry."""
    columns: int

    def ranges(self, sequences: Sequence[int]) -> list[tuple[Bytes, int, int]]:
        width = self.columns * ITEM
        return [(self.file, self.begin + sequence * width, width) for sequence in sequences]

    def rows(self, sequences: Sequence[int]) -> list[list[int]]:
        """The entries of `sequences`. Raises OSError: one cannot be read."""
        return [
            np.frombuffer(file.read(start, length), dtype="<i8").tolist()
            for file, start, length in self.ranges(sequences)
        ]


@dataclass(frozen=True)
class CachedShard:
    """A shard whose tar is open, and whose index has been verified."""

    path: str
    file: Bytes
    index: PackedIndex | FileIndex

    def sample(self, start: int, length: int, crc32: int) -> memoryview:
        """The bytes of a sample. Raises MemberError: they cannot be read, or have another crc32."""
        return read_sample(self.file, start, length, crc32)


@dataclass(frozen=True)
class _File:
    path: str
    bytes: Bytes


class ShardCache:
    """Bounds what several splits keep open, together. One thread at a time."""

    def __init__(self, *, index_bytes: int = INDEX_BYTES) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(16, min(MAX_OPEN_FILES, soft // 4))
        self.local: _Latest[_FileKey, _File] = _Latest(limit)
        """Each holds a file descriptor."""
        self.remote: _Latest[_FileKey, _File] = _Latest(MAX_REMOTE_FILES)
        self.indices: _Latest[tuple[int, int], PackedIndex] = _Latest(index_bytes, lambda index: index.bytes + 1)
        self.token_files: _Latest[tuple[int, int], Any] = _Latest(max(8, limit // 2))
        """Open token files by split and number; each holds two file descriptors."""
        self._splits = 0

    def new_key(self) -> int:
        """The key of another split."""
        self._splits += 1
        return self._splits

    def split(self, manifest: Manifest) -> "SplitShards":
        return SplitShards(manifest, self, self.new_key())


class SplitShards:
    """The shards of one split, opened through a cache."""

    def __init__(self, manifest: Manifest, cache: ShardCache, key: int) -> None:
        self._manifest, self._cache, self._key = manifest, cache, key
        self._members = {"tokens": True, "bounds": manifest.sample_format.has_documents}
        self._verified_P = verified_indices(manifest)
        self._files = cache.local if isinstance(manifest.folder, LocalFolder) else cache.remote

    def get(self, number: int) -> CachedShard:
        """Shard `number`.

        Raises:
            ShardFault: a file is missing or unreachable, the size or the index is not the manifest's.
        """
        place = (self._key, "tar", number)
        index = self._cache.indices.get((self._key, number)) or self._index(number)
        tar = self._files.get(place)
        if tar is None:
            shard, folder = self._manifest.shards[number], self._manifest.folder
            tar = _File(f"{folder.location}/{shard.name}", open_shard_file(folder, shard))
            self._files.put(place, tar)
        return CachedShard(tar.path, tar.bytes, index)

    def _index(self, number: int) -> PackedIndex | FileIndex:
        """The index of a file: verified, unless the same file was before."""
        shard, folder = self._manifest.shards[number], self._manifest.folder
        columns, place = 3 + 2 * len(self._members), (self._key, "index", number)
        known = self._files.get(place)
        if known is not None:  # it was verified when it was put there
            return FileIndex(known.bytes, known.bytes.size - shard.sequences * columns * ITEM, columns)
        file, header = index_file(folder, shard, columns=columns)
        identity = digest_of(f"{file.identity} {file.size} {shard.index_sha256}")
        if file.identity is not None and self._verified_P[number] == identity:
            self._files.put(place, _File(shard.index, file))
            return FileIndex(file, len(header), columns)
        index = PackedIndex(verified_index(folder, shard, file, header, self._members))
        if file.identity is not None:
            self._verified_P[number] = identity
        self._cache.indices.put((self._key, number), index)
        return index


def verified_indices(manifest: Manifest) -> NDArray[np.int64]:
    """[P]: digest of the identity of each index that was verified; 0: none was. Few shards are all in memory."""
    shards = len(manifest.shards)
    if shards < MIN_SHARED:
        return np.zeros(shards, dtype=np.int64)
    split = f"{manifest.fingerprint} {manifest.folder.location}"
    return shared_array(f"verified-{digest_of(split) & 0xFFFFFFFFFFFFFFFF:016x}", shards)


def digest_of(text: str) -> int:
    """A number of 64 bits, not 0, and the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) or 1


class _Latest(Generic[Key, Value]):
    """The values used last, whose costs are `limit` together."""

    def __init__(self, limit: int, cost: Callable[[Value], int] = lambda value: 1) -> None:
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._limit, self._cost, self._total = limit, cost, 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def total(self) -> int:
        return self._total

    def get(self, key: Key) -> Value | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        before: Any = self._values.pop(key, None)
        self._total += self._cost(value) - (0 if before is None else self._cost(before))
        self._values[key] = value
        while self._total > self._limit:
            _, dropped = self._values.popitem(last=False)
            self._total -= self._cost(dropped)
