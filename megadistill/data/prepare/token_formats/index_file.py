"""Indexing one token file: every id of it is read once, checked, and counted.

Legend: S tokens of a sequence, Q sequences and D documents of a file.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from megadistill.data.prepare.token_formats.formats import FORMATS
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenScan
from megadistill.data.shards.manifest import TokenFormatName
from megadistill.data.shards.shard import INDEX_SUFFIX, Shard
from megadistill.data.shards.token_files.decoded_parts import DecodedParts
from megadistill.data.shards.token_files.token_file import TokenFile
from megadistill.data.shards.token_files.token_index import TokenIndex
from megadistill.data.storage.base import HASH_BYTES, Bytes, Folder, sha256_of
from megadistill.errors import UserError
from megadistill.io import file_sha256, reason_of

BLOCK_BYTES: Final = 32 << 20
"""Bytes of ids that are checked at a time."""
NONE: Final = np.zeros(0, dtype=np.int64)

Documents = Literal["format", "eos", "bos"]
"""Documents begin where the format tells, or else behind each EOS; behind each EOS; at each BOS."""
ShowIds = Callable[[int, int], None]
"""(bytes of the file that were dealt with, ids that were read)"""


@dataclass(frozen=True)
class IndexSpec:
    """Everything but the file itself that decides its index."""

    format: TokenFormatName
    options: ScanOptions
    sequence_length: int
    documents: Documents
    bos: int | None
    eos: int


@dataclass(frozen=True)
class IndexedFile:
    """The index of a file, as the manifest needs it."""

    name: str
    shard: Shard | None
    """None: its ids fill no sequence."""
    left_out: int
    """Ids at the end that fill no sequence."""
    segments: int = 0
    documents: int = 0
    knows_documents: bool = False
    """Whether the format tells where documents begin, or such an id was found."""
    largest_id: int = 0
    begins_with_bos: bool = True
    """Whether every sequence begins with BOS."""


def index_file(folder: Folder, name: str, output: Path, spec: IndexSpec, show: ShowIds) -> IndexedFile:
    """Writes the index of the file `name` of `folder` into `output`.

    Raises:
        UserError: the file is damaged, or has ids that the tokenizer has not; one line.
    """
    scan = FORMATS[spec.format].scan(folder, name, spec.options)
    ids = int(scan.segments_G2[:, 1].sum())
    sequences = (ids - 1) // spec.sequence_length if ids else 0
    if sequences < 1:
        return IndexedFile(name, None, ids)
    path = f"{folder.location}/{name}"
    try:
        file = folder.open(name)
        opened = _opened(path, file, scan, sequences)
        reading = _Reading(opened, folder, spec, sequences, keeps_starts=_keeps_starts(scan, spec))
        reading.read_all(show)
        digest = reading.sha256()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {reason_of(error)}: get the file again, or leave it out") from None
    starts_D = reading.starts() if scan.starts_D is None or _keeps_starts(scan, spec) else scan.starts_D
    knows_documents = not _keeps_starts(scan, spec) or reading.has_starts
    starts_D = starts_D[starts_D <= sequences * spec.sequence_length] if knows_documents else NONE
    written = output / (name + INDEX_SUFFIX)
    replace(opened.index, crc32_Q=reading.crc32_Q, starts_D=starts_D).write(written)
    show(file.size, sequences * spec.sequence_length)
    return IndexedFile(
        name=name,
        shard=Shard(
            name=name,
            sequences=sequences,
            bytes=file.size,
            sha256=digest,
            index_sha256=file_sha256(written),
        ),
        left_out=ids - sequences * spec.sequence_length - 1,
        segments=len(scan.segments_G2),
        documents=len(starts_D),
        knows_documents=knows_documents,
        largest_id=reading.largest_id,
        begins_with_bos=reading.begins_with_bos,
    )


def _opened(path: str, file: Bytes, scan: TokenScan, sequences: int) -> TokenFile:
    """The file with an index that has no checksums yet."""
    index = TokenIndex.of_segments(scan.segments_G2, np.zeros(sequences, dtype=np.int64), NONE)
    dtype = np.dtype(scan.dtype).newbyteorder("<")
    return TokenFile(path, file, index, dtype, None if scan.decoder is None else DecodedParts(scan.decoder, dtype))


def _keeps_starts(scan: TokenScan, spec: IndexSpec) -> bool:
    """Whether the ids tell where documents begin."""
    return scan.starts_D is None or spec.documents != "format"


class _Reading:
    """One pass over the ids of a file."""

    def __init__(self, file: TokenFile, folder: Folder, spec: IndexSpec, sequences: int, *, keeps_starts: bool) -> None:
        self._file, self._folder, self._spec = file, folder, spec
        self._limit = min(spec.options.vocab_size, int(np.iinfo(file.dtype).max) + 1)
        self._keeps_starts = keeps_starts
        self._starts: list[NDArray[np.int64]] = []
        self._digest, self._hashed = hashlib.sha256(), 0
        self.crc32_Q = np.empty(sequences, dtype=np.int64)
        self.largest_id = 0
        self.begins_with_bos = spec.bos is not None
        self.has_starts = False

    def read_all(self, show: ShowIds) -> None:
        length, sequences = self._spec.sequence_length, len(self.crc32_Q)
        step = max(1, BLOCK_BYTES // (length * self._file.dtype.itemsize))
        for first in range(0, sequences, step):
            count = min(step, sequences - first)
            place, ids = first * length, count * length + 1
            ranges = self._file.ranges(place, ids)
            self._folder.prefetch((self._file.file, start, size) for start, size in ranges)
            data = self._file.read(place, ids)
            self._check(data, place, first, count)
            if ranges:
                self._hash_to(max(start + size for start, size in ranges))
            show(self._file.file.size * (first + count) // sequences, place + ids)

    def sha256(self) -> str:
        """The sha256 of the whole file: what lies behind the last sequence, too."""
        if self._file.parts is not None:
            return sha256_of(self._file.file)
        self._hash_to(self._file.file.size)
        return self._digest.hexdigest()

    def starts(self) -> NDArray[np.int64]:
        """Places where documents begin, as the ids tell."""
        return np.unique(np.concatenate([np.zeros(1, dtype=np.int64), *self._starts]))

    def _check(self, data: memoryview, place: int, first: int, count: int) -> None:
        """The block of `count` sequences from number `first` on, which begins at `place`."""
        spec, length, itemsize = self._spec, self._spec.sequence_length, self._file.dtype.itemsize
        ids = np.frombuffer(data, dtype=self._file.dtype)
        unsigned = ids.view(f"<u{itemsize}")  # negative ids are large ones
        largest = int(unsigned.max())
        if largest >= self._limit:
            at = int((unsigned >= self._limit).argmax())
            dtypes = ", and their --dtype" if spec.format in ("olmo", "raw") else ""
            raise UserError(
                f"{self._file.path} at {self._file.where(place + at)}: expected ids from 0 to "
                f"{spec.options.vocab_size - 1}, as the tokenizer has them, found {ids[at]}: give the tokenizer that "
                f"made the ids{dtypes}"
            )
        self.largest_id = max(self.largest_id, largest)
        width, crc32_of = length * itemsize, isal_zlib.crc32
        self.crc32_Q[first : first + count] = [
            crc32_of(data[start : start + width + itemsize]) for start in range(0, count * width, width)
        ]
        self.begins_with_bos = self.begins_with_bos and bool((ids[:-1:length] == spec.bos).all())
        if self._keeps_starts:
            own, behind = (spec.bos, 0) if spec.documents == "bos" else (spec.eos, 1)
            starts = np.flatnonzero(ids[: len(ids) - behind] == own) + (place + behind)
            self.has_starts = self.has_starts or len(starts) > 0
            self._starts.append(starts)

    def _hash_to(self, end: int) -> None:
        """Hashes the file up to byte `end`, while what was just read is at hand."""
        file: Any = self._file.file
        while self._hashed < end:
            size = min(HASH_BYTES, end - self._hashed)
            self._digest.update(file.read(self._hashed, size))
            self._hashed += size
