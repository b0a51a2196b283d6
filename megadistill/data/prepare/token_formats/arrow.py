"""Hugging Face `datasets` on disk (`save_to_disk`): where the ids of each record batch lie in the Arrow streams.

A folder has `state.json`, which names its files, `data-00000-of-00008.arrow` and so on. Each is an Arrow IPC stream.
The ids of all rows of a record batch are one buffer in the file, one row behind the other, and are read there: pyarrow
is needed to index them, and not to read them.
"""

from typing import Any, Final, cast, get_args

import numpy as np

from megadistill.data.prepare.token_formats.id_columns import id_column, listed, refuse_dtype, scan_of_rows
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenFormat, TokenScan
from megadistill.data.shards.manifest import StoredDtype
from megadistill.data.shards.token_files.list_columns import NullIdsError, ids_and_bounds, is_ids, require_pyarrow
from megadistill.data.storage.base import Folder
from megadistill.data.storage.open import folder_of
from megadistill.errors import UserError
from megadistill.io import MAX_JSON_BYTES, parse_json, reason_of

STATE: Final = "state.json"
SPLITS: Final = "dataset_dict.json"
END_OF_STREAM: Final = b"\xff\xff\xff\xff\0\0\0\0"
WAY_OUT: Final = "give the folder of one split that `save_to_disk` of datasets wrote"
AGAIN: Final = ": get the file again, or save the data set again"


def _files(path: str) -> list[str]:
    """The files of a saved data set, in the order of its rows; `path` is its folder, or its state.json.

    Raises:
        UserError: it is none, it has several splits, or its rows are not those of its files; one line.
    """
    location = path.removesuffix(f"/{STATE}").rstrip("/")
    folder = folder_of(location)
    where = f"{folder.location}/{STATE}"
    try:
        state = _json(folder, STATE)
    except (OSError, ValueError) as error:
        _refuse_splits(folder)
        raise UserError(f"{where} cannot be read: {reason_of(error)}: {WAY_OUT}") from None
    files = state.get("_data_files") if isinstance(state, dict) else None
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and name and "/" not in name for name in names):
        raise UserError(f"{where}: expected the names of files as _data_files, found {str(files)[:80]!r}: {WAY_OUT}")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{where}: its rows are chosen by a file of row numbers: write it again with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    return [f"{location}/{name}" for name in names]


def _refuse_splits(folder: Folder) -> None:
    try:
        splits = _json(folder, SPLITS)["splits"]
        names = [f"{folder.location}/{str(name)[:80]}" for name in splits]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise UserError(f"{folder.location} holds several splits: index each by itself: {', '.join(names[:20])}")


def _json(folder: Folder, name: str) -> Any:
    return parse_json(folder.read_whole(name, max_bytes=MAX_JSON_BYTES))


def _scan(folder: Folder, name: str, options: ScanOptions) -> TokenScan:
    """Raises UserError: the file is damaged, cut off or compressed, or the column holds no ids; one line."""
    where = f"{folder.location}/{name}"
    refuse_dtype(options, where)
    arrow = require_pyarrow(where)
    try:
        file = folder.open(name)
        data = file.read(0, file.size)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({reason_of(error)}){AGAIN}") from None
    if bytes(data[-len(END_OF_STREAM) :]) != END_OF_STREAM:
        raise UserError(f"{where} is not a whole Arrow stream: its end is cut off, or it is another format{AGAIN}")
    buffer = arrow.py_buffer(data)
    try:
        return _scan_stream(buffer, arrow, options, where)
    except UserError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:  # the last: a name that is not UTF-8
        raise UserError(f"{where} is not a whole Arrow stream: {' '.join(str(error).split())[:200]}{AGAIN}") from None


def _scan_stream(buffer: Any, arrow: Any, options: ScanOptions, where: str) -> TokenScan:
    """Raises pyarrow's exceptions too: the stream is damaged."""
    with arrow.ipc.open_stream(arrow.BufferReader(buffer)) as reader:
        place = column_of(reader.schema, options, arrow, where)
        dtype = dtype_of(reader.schema.field(place).type.value_type)
    segments, counts = [], []
    only = arrow.ipc.IpcReadOptions(included_fields=[place], use_threads=False)
    with arrow.ipc.open_stream(arrow.BufferReader(buffer), options=only) as reader:
        for number, batch in enumerate(reader):
            lists, here = batch.column(0), f"{where} record batch {number}"
            lists.validate(full=True)
            try:
                ids, bounds = ids_and_bounds(lists, arrow)
            except NullIdsError as error:
                raise UserError(f"{here}: {error}: save the data set without them") from None
            segments.append((_begin(ids, bounds, buffer, here), int(bounds[-1] - bounds[0])))
            counts.append(np.diff(bounds))
    segments_G2 = np.array(segments, dtype=np.int64).reshape(-1, 2)
    return scan_of_rows(dtype, segments_G2, np.concatenate([np.zeros(0, dtype=np.int64), *counts]))


def column_of(schema: Any, options: ScanOptions, arrow: Any, where: str) -> int:
    """The place of the column with the ids in an Arrow schema.

    Raises:
        UserError: there is none, or it does not hold lists of integers; one line.
    """
    place = id_column(schema.names, options.column, where)
    field = schema.field(place)
    if not is_ids(field.type, arrow):
        raise UserError(
            f"{where}: column {field.name[:80]!r} is {str(field.type)[:80]}, and ids are lists of integers: give "
            f"--column, one of {listed(schema.names)}"
        )
    return place


def dtype_of(kind: Any) -> StoredDtype:
    """numpy's name of an Arrow type of integers."""
    name = str(kind)
    assert name in get_args(StoredDtype)
    return cast(StoredDtype, name)


def _begin(ids: Any, bounds: Any, buffer: Any, where: str) -> int:
    """The byte of the stream where the ids of a record batch begin."""
    if bounds[0] == bounds[-1]:
        return 0
    width = ids.type.bit_width // 8
    begin = ids.buffers()[1].address - buffer.address + (ids.offset + int(bounds[0])) * width
    if not 0 <= begin <= begin + int(bounds[-1] - bounds[0]) * width <= buffer.size:
        raise UserError(
            f"{where} is compressed, or of another byte order, and cannot be read in place: save the data set again "
            "with save_to_disk of datasets, which does neither"
        )
    return int(begin)


ARROW: Final = TokenFormat("arrow", _files, _scan)
