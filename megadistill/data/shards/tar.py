"""Writing sequences as plain WebDataset tars, and indexing tars.

Any WebDataset reader can read the tars; this package reads them through the index, because iteration over a tar takes a
broken header for the end of the file. A sample is one sequence: `{key}.tokens.npy` and `{key}.bounds.npy`.

Legend: Q sequences of a shard, M members of a sample.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from megadistill.data.shards.manifest import SampleFormat, TokenDtype
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.shard import INDEX_SUFFIX, Shard
from megadistill.data.storage.local import MappedFile
from megadistill.errors import UserError
from megadistill.io import atomic_write, file_sha256, open_regular

SAMPLE_FORMAT: Final = SampleFormat(kind="npy", tokens="tokens.npy", bounds="bounds.npy")
"""The format of the samples that `write_shard` writes."""

MAX_SAMPLE_BYTES: Final = 1 << 28
"""Limit of one sample in its tar, headers and padding included."""
MAX_TAR_HEADER_BYTES: Final = 1 << 20
TAR_BLOCK: Final = tarfile.BLOCKSIZE
TAR_END: Final = 2 * TAR_BLOCK
"""Zeros at the end of a tar that was not cut off."""


Index = NDArray[np.int64]
"""[Q, 3 + 2·M], described in `opening`."""


def write_shard(path: Path, sequences: Iterable[PackedSequence], *, dtype: TokenDtype) -> Shard:
    """Writes `sequences` as the tar `path` and its index, each whole or not at all; the same ones give the same bytes.

    Returns the manifest's record of both.

    Raises:
        ValueError: there are no sequences, or an id does not fit into `dtype`.
    """
    arrays = (
        {"tokens.npy": _narrowed(sequence.tokens, dtype), "bounds.npy": _narrowed(sequence.bounds, "uint32")}
        for sequence in sequences
    )
    write_tar(path, ({"__key__": f"{number:010d}", **sample} for number, sample in enumerate(arrays)))
    return write_index(path, index_sequences(path, SAMPLE_FORMAT))


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Writes samples with webdataset, whole or not at all. Raises ValueError: there are none."""
    count = 0
    with atomic_write(path) as file:
        with TarWriter(file, mtime=0) as tar:  # a real mtime adds a PAX header of 1 KB a member
            for sample in samples:
                tar.write(sample)
                count += 1
        if not count:
            raise ValueError(f"{path}: a shard has one sample at least")


def write_index(path: Path, index: Index) -> Shard:
    """Writes the index of the tar `path`; returns the manifest's record of both."""
    with atomic_write(index_path(path)) as file:
        np.save(file, index, allow_pickle=False)
    return Shard(
        name=path.name,
        sequences=len(index),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        index_sha256=file_sha256(index_path(path)),
    )


def index_path(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _narrowed(ids: NDArray[np.int32], dtype: TokenDtype) -> NDArray[np.unsignedinteger[Any]]:
    if ids.min() < 0 or ids.max() > np.iinfo(dtype).max:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit into {dtype}")
    return ids.astype(np.dtype(dtype).newbyteorder("<"))


@dataclass(frozen=True)
class Sample:
    """Neighbouring members whose names differ in the suffix alone, and the bytes [start, stop) from the last sample."""

    key: str
    start: int
    stop: int
    members: dict[str, tarfile.TarInfo]
    """Suffix in lower case -> member."""

    @property
    def suffixes(self) -> str:
        """Names of the members for a message of one line."""
        return ", ".join(repr(suffix[:100]) for suffix in list(self.members)[:10])


def index_sequences(path: Path, record: SampleFormat) -> Index:
    """The index [Q, 7] of a finished tar of sequences. Raises UserError as `index_tar`."""
    return index_tar(path, (record.tokens, record.bounds))


def index_tar(path: Path, suffixes: Sequence[str | None]) -> Index:
    """The index [Q, 3 + 2·M] of a finished tar whose samples have members with the `suffixes`; None: no such member.

    Raises:
        UserError: the tar is damaged, or a sample has no such members; one line.
    """
    file = map_tar(path)
    rows = []
    for sample in samples(path):
        where = f"{path} sample {sample.key[:200]!r} at byte {sample.start}"
        length = sample.stop - sample.start
        if length > MAX_SAMPLE_BYTES:
            raise UserError(f"{where} has {length} bytes, more than the {MAX_SAMPLE_BYTES} allowed: leave it out")
        row = [sample.start, length, isal_zlib.crc32(file.read(sample.start, length))]
        for suffix in suffixes:
            member = member_of(sample, suffix, where) if suffix else None
            row += (0, 0) if member is None else (member.offset_data - sample.start, member.size)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no samples: leave it out of the folder")
    return np.array(rows, dtype=np.int64)


def samples(path: Path) -> Iterator[Sample]:
    """The samples of a tar as webdataset groups them: without folders, links, and names without a suffix.

    Raises:
        UserError: it is not a tar, or it is damaged; one line.
    """
    with open_regular(path) as file:
        try:
            with tarfile.open(fileobj=_BoundedReader(file), mode="r:") as tar:  # type: ignore[call-overload]
                yield from _grouped(path, tar)
                _refuse_rest(path, file, tar.offset)
        except (tarfile.TarError, OverflowError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a whole tar: {error}: get it again") from None


def _grouped(path: Path, tar: tarfile.TarFile) -> Iterator[Sample]:
    key, start, stop = "", 0, 0
    members: dict[str, tarfile.TarInfo] = {}
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
        members[suffix] = entry
    if members:
        yield Sample(key, start, stop, members)


def member_of(sample: Sample, suffix: str, where: str) -> tarfile.TarInfo:
    """The member of a sample with the suffix. Raises UserError: there is none, or it is not a plain file."""
    member = sample.members.get(suffix.lower())
    if member is None:
        raise UserError(f"{where} has no member {suffix}, only {sample.suffixes}: leave it out")
    if not member.isreg() or member.issparse():
        raise UserError(
            f"{where}: its member {member.name[:200]!r} is not a plain file: write the tar again without links"
        )
    return member


def _refuse_rest(path: Path, file: BinaryIO, end: int) -> None:
    """Raises UserError: iteration ended at a block that is no header, before the end of the tar."""
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


def map_tar(path: Path) -> MappedFile:
    """The tar `path`, to read ranges of. Raises UserError: it cannot be read."""
    try:
        return MappedFile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): get it again, or leave it out") from None


class _BoundedReader:
    """A file whose headers are read: one that claims too many bytes is refused before memory is allocated."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"it has a header of {size} bytes, more than the {MAX_TAR_HEADER_BYTES} allowed")
        return self._file.read(size)
