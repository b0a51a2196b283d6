"""Reading sequences of token files by their places, each one checked: crc32 over its bytes, ids below the vocabulary.

Legend: N places to read, n those of one file, T = S + 1 tokens of a sequence, D documents of a file.
"""

from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from megadistill.data.shards.manifest import Manifest, TokenFileFormat
from megadistill.data.shards.opening import ShardFault, open_shard_file
from megadistill.data.shards.sequence_batch import Places, SequenceBatch, Tokens, by_shard, ids_below, with_faults
from megadistill.data.shards.shard_cache import ShardCache, digest_of, verified_indices
from megadistill.data.shards.token_files.token_file import TokenFile, data_folder, parts_of
from megadistill.data.shards.token_files.token_index import index_of, open_index, stored

_Group = tuple[TokenFile, list[int], list[int]]
"""A file; rows of a batch; the sequence of each in that file."""


class TokenFileReader:
    """Sequences of a split of token files; one thread at a time."""

    def __init__(self, manifest: Manifest, record: TokenFileFormat, cache: ShardCache) -> None:
        self._manifest, self._record = manifest, record
        self._data = data_folder(manifest, record)
        self._stored = stored(record)
        # Ids are read as unsigned: those from here on are past the vocabulary, or negative.
        self._limit = min(manifest.vocab_size, int(np.iinfo(self._stored).max) + 1)
        self._parts = parts_of(record)
        self._opened, self._key = cache.token_files, cache.new_key()
        self._verified_P = verified_indices(manifest)
        self._broken: dict[int, ShardFault] = {}

    def read(self, places_N2: Places) -> SequenceBatch:
        """The sequences at `places_N2` [N, 2]: shard, and sequence in it. Faults are reported, not raised."""
        length, step = self._manifest.sequence_length + 1, self._manifest.sequence_length
        raw_NT = np.zeros((len(places_N2), length), dtype=f"<u{self._stored.itemsize}")
        bounds = [np.array([0, length])] * len(places_N2)
        faults: dict[int, ShardFault] = {}
        groups = self._groups(places_N2, faults)
        self._data.prefetch(
            (file.file, start, size)
            for file, _, sequences in groups
            for sequence in sequences
            for start, size in file.ranges(sequence * step, length)
        )
        for file, rows, sequences in groups:
            wrong = self._copy(file, rows, sequences, raw_NT)
            for row, sequence in zip(rows, sequences, strict=True) if wrong else ():
                if row in wrong:
                    at = f"{file.path} sequence {sequence} at {file.where(sequence * step)}"
                    faults[row] = ShardFault(f"{at}: {wrong[row]}")
            if self._record.has_documents:
                _set_bounds(bounds, rows, np.array(sequences) * step, file.index.starts_D, length)
        for row, message in self._large_ids(raw_NT, faults).items():
            (path, sequence, at) = self._location(groups, row)
            faults[row] = ShardFault(f"{path} sequence {sequence} at {at}: {message}")
        tokens_NT: Tokens = raw_NT.astype(self._manifest.dtype, copy=False)
        return with_faults(tokens_NT, bounds, faults)

    def _groups(self, places_N2: Places, faults: dict[int, ShardFault]) -> list[_Group]:
        """The rows of each file that opens; the others are faults."""
        groups = []
        for number, sequences in by_shard(places_N2).items():
            file = self._file(number)
            if isinstance(file, ShardFault):
                faults.update(dict.fromkeys(sequences, file))
            else:
                groups.append((file, list(sequences), list(sequences.values())))
        return groups

    def _file(self, number: int) -> TokenFile | ShardFault:
        """One that does not open is not tried again."""
        file = self._opened.get((self._key, number)) or self._broken.get(number)
        if file is None:
            try:
                file = self._open(number)
                self._opened.put((self._key, number), file)
            except ShardFault as fault:
                file = self._broken[number] = fault
        return file

    def _open(self, number: int) -> TokenFile:
        """An index is verified once on this node, as long as its file stays the same."""
        manifest, record, shard = self._manifest, self._record, self._manifest.shards[number]
        file = open_index(manifest.folder, manifest, record, shard)
        identity = digest_of(f"{file.identity} {file.size} {shard.index_sha256}")
        known = file.identity is not None and bool(self._verified_P[number] == identity)
        index = index_of(file, manifest.folder, manifest, record, shard, verified=known)
        if file.identity is not None:
            self._verified_P[number] = identity
        path = f"{self._data.location}/{shard.name}"
        return TokenFile(path, open_shard_file(self._data, shard), index, self._stored, self._parts)

    def _copy(self, file: TokenFile, rows: list[int], sequences: list[int], raw_NT: Tokens) -> dict[int, str]:
        """The hot loop: copies the bytes of each intact sequence into its row; row -> message for each damaged one."""
        flat, width, length = raw_NT.data.cast("B"), raw_NT.strides[0], raw_NT.shape[1]
        step = length - 1
        crc32_n = file.index.crc32_Q[sequences].tolist()
        read, crc32_of = file.read, isal_zlib.crc32
        wrong: dict[int, str] = {}
        for row, sequence, crc32 in zip(rows, sequences, crc32_n, strict=True):
            try:
                data = read(sequence * step, length)
            except (OSError, ValueError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                wrong[row] = reason if reason.startswith("expected") else f"expected {length} ids, found: {reason}"
                continue
            if (actual := crc32_of(data)) != crc32:
                wrong[row] = f"expected crc32 {crc32:#010x}, found {actual:#010x}"
            else:
                flat[row * width : (row + 1) * width] = data
        return wrong

    def _large_ids(self, raw_NT: Tokens, faults: dict[int, ShardFault]) -> dict[int, str]:
        """Row -> message, for each row that has an id that the vocabulary has not."""
        limit, vocab_size = self._limit, self._manifest.vocab_size
        if raw_NT.size == 0 or raw_NT.max() < limit:
            return {}
        large_N = raw_NT.max(axis=1) >= limit
        return {
            row: ids_below(vocab_size, raw_NT[row].view(self._stored)[(raw_NT[row] >= limit).argmax()])
            for row in np.flatnonzero(large_N).tolist()
            if row not in faults
        }

    def _location(self, groups: list[_Group], row: int) -> tuple[str, int, str]:
        """Path, sequence and place in the file of a row, for messages."""
        file, rows, sequences = next(group for group in groups if row in group[1])
        sequence = sequences[rows.index(row)]
        return file.path, sequence, file.where(sequence * self._manifest.sequence_length)


def _set_bounds(
    bounds: list[NDArray[np.int64]], rows: list[int], first_n: NDArray[Any], starts_D: NDArray[np.int64], length: int
) -> None:
    """Sets the bounds of the sequences that begin at the places `first_n`: 0, the documents that begin inside, T."""
    low_n = np.searchsorted(starts_D, first_n, side="right")
    counts_n = np.searchsorted(starts_D, first_n + length, side="left") - low_n
    ends_n = np.cumsum(counts_n + 2)
    inner = np.arange(int(counts_n.sum()))
    before_n = np.cumsum(counts_n) - counts_n
    values = np.zeros(int(ends_n[-1]), dtype=np.int64)
    values[ends_n - 1] = length
    places = np.repeat(ends_n - 1 - counts_n - before_n, counts_n) + inner
    values[places] = starts_D[np.repeat(low_n - before_n, counts_n) + inner] - np.repeat(first_n, counts_n)
    begins = (ends_n - counts_n - 2).tolist()
    for row, begin, end in zip(rows, begins, ends_n.tolist(), strict=True):
        bounds[row] = values[begin:end]
