"""Shards: units to plain WebDataset tars, and tars to their indices. It knows no manifest file and no order.

Any WebDataset reader can read the tars; this package reads them through the index, because iterating over a tar takes a
broken header for the end of the file. A shard is a sample a unit: `{key}.tokens.npy` and `{key}.bounds.npy`.

Legend: S tokens of a sequence, U units of a shard, D documents of a unit.
"""

import itertools
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from megadistill.data.shards.manifest import INDEX_SUFFIX, Shard, TokenDtype, UnitRecord
from megadistill.data.shards.packing import Unit
from megadistill.data.storage.local import MappedFile
from megadistill.errors import UserError
from megadistill.io import file_sha256, written_whole

OWN_UNIT: Final = UnitRecord(kind="npy", tokens="tokens.npy", bounds="bounds.npy")
"""How a unit lies in the tars that `write_shard` writes."""

MAX_UNIT_BYTES: Final = 1 << 28
"""Of one sample in its tar, headers and all."""
MAX_TAR_HEADER_BYTES: Final = 1 << 20
TAR_BLOCK: Final = tarfile.BLOCKSIZE
TAR_END: Final = 2 * TAR_BLOCK
"""Zeros that say that a tar ends here, and was not cut off."""


class Column(IntEnum):
    """What an index [U, 7] int64 says of each unit.

    A unit is `LENGTH` bytes of the tar from `START`, with the headers and the padding of its members, and their crc32.
    Units touch each other, and the first begins at 0. The members' places are relative to `START`; a unit without
    bounds has 0 bytes of them.
    """

    START = 0
    LENGTH = 1
    CRC32 = 2
    TOKENS_AT = 3
    TOKENS_BYTES = 4
    BOUNDS_AT = 5
    BOUNDS_BYTES = 6


Index = NDArray[np.int64]


def write_shard(path: Path, units: Iterable[Unit], *, dtype: TokenDtype) -> Shard:
    """Writes `units` as the tar `path` and its index, each whole or not at all. The same units give the same bytes.

    Returns what the manifest says of them.

    Raises:
        ValueError: there are no units, or an id does not fit into `dtype`.
    """
    waiting = iter(units)
    first = next(waiting, None)
    if first is None:
        raise ValueError(f"{path}: a shard has one unit at least")
    with (
        written_whole(path) as file,
        TarWriter(file, mtime=0) as tar,
    ):  # a real mtime adds a PAX header of 1 KB a member
        for number, unit in enumerate(itertools.chain([first], waiting)):
            tokens, bounds = _narrowed(unit.tokens, dtype), _narrowed(unit.bounds, "uint32")
            tar.write({"__key__": f"{number:010d}", "tokens.npy": tokens, "bounds.npy": bounds})
    return publish(path, index_tar(path, OWN_UNIT))


def publish(path: Path, rows_U7: Index) -> Shard:
    """Writes the index of the tar `path`; returns what the manifest says of both."""
    index = index_path(path)
    with written_whole(index) as file:
        np.save(file, rows_U7, allow_pickle=False)
    return Shard(
        name=path.name,
        units=len(rows_U7),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        index_sha256=file_sha256(index),
    )


def index_path(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _narrowed(ids: NDArray[np.int32], dtype: TokenDtype) -> NDArray[np.unsignedinteger[Any]]:
    if ids.min() < 0 or ids.max() > np.iinfo(dtype).max:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit into {dtype}")
    return ids.astype(np.dtype(dtype).newbyteorder("<"))


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie in a tar; `plain`: it is a file, no link, device, folder or sparse file."""

    name: str
    at: int
    bytes: int
    plain: bool


@dataclass(frozen=True)
class Sample:
    """Neighbouring members whose names differ in the suffix alone, and the bytes [start, stop) from the last sample."""

    key: str
    start: int
    stop: int
    members: dict[str, Member]
    """By suffix, in small letters."""

    @property
    def suffixes(self) -> str:
        """For messages, in which nothing from a tar may break the line."""
        return ", ".join(repr(suffix[:100]) for suffix in list(self.members)[:10])


def index_tar(path: Path, record: UnitRecord) -> Index:
    """[U, 7]: the index of a finished tar whose samples are units as `record` says. See `Column`.

    Raises:
        UserError: the tar is damaged, or a sample is no such unit; one line.
    """
    file = mapped(path)
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    for sample in samples(path):
        where = f"{path} sample {sample.key[:200]!r} at byte {sample.start}"
        length = sample.stop - sample.start
        if length > MAX_UNIT_BYTES:
            raise UserError(f"{where} has {length} bytes, more than the {MAX_UNIT_BYTES} allowed: leave it out")
        tokens = member_of(sample, record.tokens, where)
        bounds = member_of(sample, record.bounds, where) if record.bounds else Member("", sample.start, 0, True)
        crc = zlib.crc32(file.read(sample.start, length))
        places = (tokens.at - sample.start, tokens.bytes, bounds.at - sample.start, bounds.bytes)
        rows.append((sample.start, length, crc, *places))
    if not rows:
        raise UserError(f"{path} holds no samples: leave it out of the folder")
    return np.array(rows, dtype=np.int64)


def samples(path: Path) -> Iterator[Sample]:
    """The samples of a tar, as webdataset sees them: it leaves out folders, links, and names without a suffix.

    Raises:
        UserError: it is no tar, or it is damaged; one line.
    """
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:  # type: ignore[call-overload]
                yield from _grouped(path, tar)
                _refuse_rest(path, file, tar.offset)
        except (tarfile.TarError, OverflowError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a whole tar: {error}: get it again") from None


def _grouped(path: Path, tar: tarfile.TarFile) -> Iterator[Sample]:
    key, start, stop = "", 0, 0
    members: dict[str, Member] = {}
    while (entry := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
        prefix, suffix = base_plus_ext(entry.name)
        if prefix is None or re.match(r"__[^/]*__($|/)", entry.name):
            stop = tar.offset
            continue
        suffix = suffix.lower()
        if prefix != key and members:
            yield Sample(key, start, stop, members)
            start, members = stop, {}
        if suffix in members:
            raise UserError(
                f"{path} at byte {entry.offset} has {entry.name[:200]!r} twice in one sample: write it again"
            )
        key, stop = prefix, tar.offset
        plain = entry.isreg() and not entry.issparse()
        members[suffix] = Member(entry.name, entry.offset_data, entry.size, plain)
    if members:
        yield Sample(key, start, stop, members)


def member_of(sample: Sample, suffix: str, where: str) -> Member:
    """The member of a sample with the suffix. Raises UserError, which says `where`: there is none, or it is no file."""
    member = sample.members.get(suffix.lower())
    if member is None:
        raise UserError(f"{where} has no member {suffix}, only {sample.suffixes}: leave it out")
    if not member.plain:
        raise UserError(
            f"{where}: its member {member.name[:200]!r} is not a plain file: write the tar again without links"
        )
    return member


def _refuse_rest(path: Path, file: BinaryIO, end: int) -> None:
    """Iteration over a tar ends at the first block that is no header, whatever lies behind it; here, that is seen."""
    file.seek(end)
    zeros = 0
    while part := file.read(1 << 20):
        if any(part):
            raise UserError(
                f"{path} is damaged: at byte {end} a tar header was expected, found something else: get it again"
            )
        zeros += len(part)
    if zeros < TAR_END:
        raise UserError(
            f"{path} is cut off: {TAR_END} bytes of zeros were expected at byte {end}, found {zeros}: get it again"
        )


def mapped(path: Path) -> MappedFile:
    """The tar `path`, to read ranges of. Raises UserError: it cannot be read."""
    try:
        return MappedFile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): get it again, or leave it out") from None


class _Bounded:
    """A file of which headers are read: what claims to be a longer one is refused before memory is set aside for it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"it has a header of {size} bytes, more than the {MAX_TAR_HEADER_BYTES} allowed")
        return self._file.read(size)
