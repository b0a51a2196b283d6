"""Columns of lists of ids in tables of Arrow and parquet, as pyarrow (extra `parquet`) gives them.

Legend: R rows of a column.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadistill.errors import UserError


class NullIdsError(ValueError):
    """A row or an id is null."""


def require_pyarrow(where: str) -> Any:
    """pyarrow with its readers, an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.ipc  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UserError(f"{where}: reading it needs pyarrow: pip install 'megadistill[parquet]'") from None
    return pyarrow


def is_ids(kind: Any, arrow: Any) -> bool:
    """Whether a type of pyarrow is that of lists of integers."""
    types = arrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_integer(kind.value_type))


def ids_and_bounds(lists: Any, arrow: Any) -> tuple[Any, NDArray[np.int64]]:
    """The Arrow array with the ids of all rows, and [R + 1]: where those of each row begin, and the last ones end.

    Raises:
        NullIdsError: a row or an id is null.
    """
    if lists.null_count:
        raise NullIdsError(f"{lists.null_count} of {len(lists)} rows are null")
    if arrow.types.is_fixed_size_list(lists.type):
        bounds = (np.arange(len(lists) + 1, dtype=np.int64) + lists.offset) * lists.type.list_size
    else:
        bounds = lists.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    ids, first, last = lists.values, int(bounds[0]), int(bounds[-1])
    if nulls := ids.slice(first, last - first).null_count:
        raise NullIdsError(f"{nulls} of {last - first} ids are null")
    return ids, bounds
