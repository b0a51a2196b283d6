"""Row groups of a parquet file: the ids of one column of lists, decoded by pyarrow (extra `parquet`).

Legend: R rows of a row group.
"""

import io
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import DecoderRecord
from megadistill.data.shards.token_files.list_columns import ids_and_bounds, is_ids, require_pyarrow
from megadistill.data.storage.base import Bytes

MAX_ROW_GROUP_IDS: Final = 1 << 26
"""Most ids of a row group: all of them are decoded for one sequence, in 256 MiB of int32."""
ROWS_AT_A_TIME: Final = 1024
"""Rows that are decoded until the ids are counted: a footer's own counts are not asked for, as a damaged one ends the
process in pyarrow."""
OPEN_FILES: Final = 64
"""Files whose footers a process keeps."""

Ids = NDArray[np.integer[Any]]


class RowGroups:
    """A parquet file, of which one row group's ids are read at a time."""

    def __init__(self, file: Bytes) -> None:
        """Raises ValueError or OSError: it is damaged or unreachable."""
        self._arrow = require_pyarrow("a parquet file of ids")
        self._stream = _Stream(file)
        try:
            source = self._arrow.PythonFile(self._stream, mode="r")
            self._file = self._arrow.parquet.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
            self.schema = self._file.schema_arrow
        except self._arrow.ArrowException as error:
            raise ValueError(_reason(error)) from None

    def __len__(self) -> int:
        return int(self._file.num_row_groups)

    def read(self, part: int, column: str) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of row group `part`, and [R]: the number of ids of each row.

        Raises:
            ValueError: it is damaged or too large, the column holds no lists of integers, or a row or an id is null.
            OSError: it is unreachable.
        """
        if not 0 <= part < len(self):
            raise ValueError(f"expected row group {part}, found {len(self)} row groups")
        parts: list[Ids] = []
        counts = [np.zeros(0, dtype=np.int64)]
        try:
            for batch in self._file.iter_batches(
                ROWS_AT_A_TIME, row_groups=[part], columns=[column], use_threads=False
            ):
                if batch.schema.names != [column] or not is_ids(batch.schema.field(0).type, self._arrow):
                    raise ValueError(f"expected lists of integers as {column!r}, found {str(batch.schema)[:80]!r}")
                lists = batch.column(0)
                lists.validate(full=True)
                ids, bounds = ids_and_bounds(lists, self._arrow)
                first, last = int(bounds[0]), int(bounds[-1])
                parts.append(ids.slice(first, last - first).to_numpy(zero_copy_only=False))
                counts.append(np.diff(bounds))
                _require_few(sum(map(len, parts)))
        except self._arrow.ArrowException as error:
            raise ValueError(_reason(error)) from None
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64), np.concatenate(counts)


def _require_few(ids: int) -> None:
    if ids > MAX_ROW_GROUP_IDS:
        raise ValueError(
            f"a row group has more than the {MAX_ROW_GROUP_IDS:,} ids allowed, as all are decoded for one sequence of "
            "them: write the file again with smaller row groups"
        )


class _Stream(io.RawIOBase):
    """A file of a storage backend, as pyarrow reads one."""

    def __init__(self, file: Bytes) -> None:
        super().__init__()
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._place)
        length = left if size < 0 else min(size, left)
        data = bytes(self._file.read(self._place, length)) if length else b""
        self._place += length
        return data


def decode_row_group(file: Bytes, part: int, record: DecoderRecord) -> Ids:
    """The ids of a row group.

    Raises:
        ValueError: it is damaged.
        OSError: it is unreachable.
    """
    ids, _ = _opened(file).read(part, record.column)  # type: ignore[arg-type]  # a file is hashed by its identity
    return ids


@lru_cache(maxsize=OPEN_FILES)
def _opened(file: Bytes) -> RowGroups:
    return RowGroups(file)


def _reason(error: Exception) -> str:
    return f"not whole parquet: {' '.join(str(error).split())[:200]}"
