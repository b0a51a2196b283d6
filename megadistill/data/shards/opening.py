"""Opening a shard: a tar and its index, compared with what the manifest records of them.

An index is [Q, 3 + 2·M] int64 for the Q samples of a tar: the byte where a sample begins, its length and its crc32,
headers and padding included; then, for each of M members, where it begins in the sample, and its bytes (0: the sample
has none). Samples touch each other, and the first begins at 0. Columns of the caller's own may stand before these.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from isal import isal_zlib

from megadistill.data.shards.npy import MemberError, npy_header_of
from megadistill.data.shards.shard import Shard
from megadistill.data.shards.tar import MAX_SAMPLE_BYTES, Index
from megadistill.data.storage.base import Bytes, Folder
from megadistill.errors import OperatorFault

OPEN_SHARDS: Final = 64
"""Shards of stored targets that a reader keeps open: they lie in the order of the slots."""


class ShardFault(OperatorFault):
    """A shard does not hold what its manifest records. One line: where, expected, found."""


@dataclass(frozen=True)
class OpenShard:
    """A shard whose size and index are those of its manifest."""

    path: str
    file: Bytes
    index: Index

    def sample(self, start: int, length: int, crc32: int) -> memoryview:
        """The bytes of a sample. Raises MemberError: they cannot be read, or have another crc32."""
        return read_sample(self.file, start, length, crc32)


def read_sample(file: Bytes, start: int, length: int, crc32: int) -> memoryview:
    """The bytes of a sample in a tar. isal's crc32 is zlib's, in an eighth of the time.

    Raises:
        MemberError: they cannot be read, or have another crc32.
    """
    try:
        data = file.read(start, length)
    except OSError as error:
        raise MemberError(f"expected {length} bytes, found: {error.strerror or error}") from None
    if isal_zlib.crc32(data) != crc32:
        raise MemberError(f"expected crc32 {crc32:#010x}, found {isal_zlib.crc32(data):#010x}")
    return data


def open_indexed_tar(folder: Folder, shard: Shard, members: Mapping[str, bool], *, own_columns: int = 0) -> OpenShard:
    """The tar and the index of `shard` in `folder`.

    `members` are names for messages, and whether each sample has that member; `own_columns` stand before the others.

    Raises:
        ShardFault: a file is missing or unreachable, or has another size; the index is another one, or impossible.
    """
    file, header = index_file(folder, shard, columns=own_columns + 3 + 2 * len(members))
    index = verified_index(folder, shard, file, header, members, own_columns=own_columns)
    return OpenShard(f"{folder.location}/{shard.name}", open_shard_file(folder, shard), index)


def open_shard_file(folder: Folder, shard: Shard) -> Bytes:
    """The tar, or the token file. Raises ShardFault: it is missing or unreachable, or has another size."""
    path = f"{folder.location}/{shard.name}"
    try:
        file = folder.open(shard.name)
    except OSError as error:
        raise ShardFault(f"{path}: expected a file of {shard.bytes} bytes, found: {error.strerror or error}") from None
    if file.size != shard.bytes:
        raise ShardFault(f"{path}: expected {shard.bytes} bytes, found {file.size}")
    return file


def index_file(folder: Folder, shard: Shard, *, columns: int) -> tuple[Bytes, bytes]:
    """The file of an index [Q, columns], and the header that it must begin with; its size is checked, no more.

    Raises:
        ShardFault: it is missing or unreachable, or has another size.
    """
    path = f"{folder.location}/{shard.index}"
    header = npy_header_of((shard.sequences, columns), "<i8")
    expected = len(header) + shard.sequences * columns * 8
    try:
        file = folder.open(shard.index)
    except OSError as error:
        raise ShardFault(f"{path}: expected the index of {shard.name}, found: {error.strerror or error}") from None
    if file.size != expected:
        raise ShardFault(f"{path}: expected {expected} bytes, found {file.size}")
    return file, header


def verified_index(
    folder: Folder, shard: Shard, file: Bytes, header: bytes, members: Mapping[str, bool], *, own_columns: int = 0
) -> Index:
    """[Q, columns], not copied, from the `file` and `header` of `index_file`.

    Raises:
        ShardFault: it cannot be read, is another one, or impossible.
    """
    path = f"{folder.location}/{shard.index}"
    columns = own_columns + 3 + 2 * len(members)
    try:
        data = file.read(0, file.size)
    except OSError as error:
        raise ShardFault(f"{path}: expected the index of {shard.name}, found: {error.strerror or error}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.index_sha256:
        raise ShardFault(
            f"{path}: expected the index with sha256 {shard.index_sha256[:12]}…, found one with {digest[:12]}…"
        )
    if data[: len(header)] != header:
        raise ShardFault(
            f"{path}: expected an .npy of ({shard.sequences}, {columns}) int64, found {bytes(data[:100])!r}"
        )
    index = np.frombuffer(data, dtype="<i8", offset=len(header)).reshape(shard.sequences, columns)
    _require_sound(index[:, own_columns:], shard, members, path)
    return index


def _require_sound(index: Index, shard: Shard, members: Mapping[str, bool], path: str) -> None:
    """Raises ShardFault: a range is impossible; the first such sequence, and what was expected of it."""
    start, length, crc32, *places = index.T
    sizes = np.delete(index, 2, axis=1)
    checks = [  # the first two keep the sums of the others from overflowing
        ((sizes >= 0).all(axis=1) & (sizes <= shard.bytes).all(axis=1), f"places in {shard.bytes} bytes"),
        ((crc32 >= 0) & (crc32 < 1 << 32), "a crc32"),
        ((length > 0) & (length <= MAX_SAMPLE_BYTES), f"at most {MAX_SAMPLE_BYTES} bytes"),
        (start == np.append(0, (start + length)[:-1]), "sequences that touch each other"),
        (start + length <= shard.bytes, f"a range that ends before byte {shard.bytes}"),
    ]
    for (name, present), at, size in zip(members.items(), places[::2], places[1::2], strict=True):
        text = f"a {name} member inside the sequence" if present else f"no {name} member"
        checks.append(((at + size <= length) & ((size > 0) == present), text))
    for holds, text in checks:
        if not holds.all():
            number = int(holds.argmin())
            raise ShardFault(f"{path} sequence {number}: expected {text}, found {index[number].tolist()}")
