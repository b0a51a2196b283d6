"""Ids that do not lie in a file as they are: parts, such as the row groups of parquet, that are decoded.

A decoder gives all ids of one part; the parts used last are kept.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import DecoderRecord
from megadistill.data.shards.token_files.list_columns import require_pyarrow
from megadistill.data.shards.token_files.parquet_parts import decode_row_group
from megadistill.data.storage.base import Bytes

CACHE_BYTES: Final = 256 << 20
"""Memory of the decoded parts of a reader."""

Ids = NDArray[np.integer[Any]]
PartDecoder = Callable[[Bytes, int, DecoderRecord], Ids]
"""(file, number of the part, record) -> the ids of the part. Raises ValueError or OSError: it is damaged."""

DECODERS: Final[dict[str, PartDecoder]] = {"parquet": decode_row_group}
"""Kind of a `DecoderRecord` -> its decoder."""


class DecodedParts:
    """The decoded parts used last, within CACHE_BYTES. One thread at a time."""

    def __init__(self, record: DecoderRecord, dtype: np.dtype[Any]) -> None:
        """Raises UserError: pyarrow is missing, which would be a fault of every sequence later."""
        require_pyarrow("parquet files of ids")
        self._record, self._dtype = record, dtype
        self._decode = DECODERS[record.kind]
        self._parts: OrderedDict[tuple[str, int], Ids] = OrderedDict()
        self._bytes = 0

    def ids(self, path: str, file: Bytes, part: int) -> Ids:
        """The ids of a part of the file at `path`. Raises ValueError or OSError: it is damaged or unreachable."""
        ids = self._parts.get((path, part))
        if ids is None:
            ids = self._decode(file, part, self._record)
            if ids.dtype != self._dtype:
                raise ValueError(f"expected ids of {self._dtype.name} in part {part}, found {ids.dtype.name}")
            self._parts[path, part] = ids
            self._bytes += ids.nbytes
            while self._bytes > CACHE_BYTES and len(self._parts) > 1:
                self._bytes -= self._parts.popitem(last=False)[1].nbytes
        self._parts.move_to_end((path, part))
        return ids
