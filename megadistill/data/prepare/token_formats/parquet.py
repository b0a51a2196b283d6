"""Parquet files with a column of ids: row groups, which are decoded when they are read.

The ids of a parquet file are compressed and packed a page at a time, so that none lies in it as it is: a sequence costs
the decoding of its row group, unless that is among those that were decoded last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from megadistill.data.prepare.token_formats.arrow import column_of, dtype_of
from megadistill.data.prepare.token_formats.id_columns import refuse_dtype, scan_of_rows
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, Stored, TokenFormat, TokenScan
from megadistill.data.shards.manifest import DecoderRecord, StoredDtype
from megadistill.data.shards.token_files.list_columns import require_pyarrow
from megadistill.data.shards.token_files.parquet_parts import RowGroups
from megadistill.data.storage.base import Folder
from megadistill.errors import UserError
from megadistill.io import reason_of

ENDING: Final = ".parquet"


def _files(path: str) -> list[str]:
    """A file, or the parquet files of a folder in the order of their names. Raises UserError: there are none."""
    folder = Path(path)
    if "://" in path or not folder.is_dir():
        return [path]
    names = sorted(str(each) for each in folder.iterdir() if each.name.endswith(ENDING))
    if not names:
        raise UserError(f"{path} holds no {ENDING} files: give a folder of them, or each by itself")
    return names


def _stored(folder: Folder, name: str, options: ScanOptions) -> Stored:
    """Reads the footer alone."""
    with _readable(folder, name) as where:
        _, dtype, decoder = _opened(folder, name, options, where)
        return dtype, decoder


def _scan(folder: Folder, name: str, options: ScanOptions) -> TokenScan:
    """Reads every row group. Raises UserError: the file is damaged, or the column holds no ids; one line."""
    with _readable(folder, name) as where:
        groups, dtype, decoder = _opened(folder, name, options, where)
        counts = [groups.read(part, decoder.column)[1] for part in range(len(groups))]
    segments_G2 = np.array([(part, count.sum()) for part, count in enumerate(counts)], dtype=np.int64).reshape(-1, 2)
    return scan_of_rows(dtype, segments_G2, np.concatenate([np.zeros(0, dtype=np.int64), *counts]), decoder)


@contextmanager
def _readable(folder: Folder, name: str) -> Iterator[str]:
    """The path of a file, for messages. Raises UserError: reading it failed; one line."""
    where = f"{folder.location}/{name}"
    try:
        yield where
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {reason_of(error)}: get the file again, or write it again") from None


def _opened(
    folder: Folder, name: str, options: ScanOptions, where: str
) -> tuple[RowGroups, StoredDtype, DecoderRecord]:
    refuse_dtype(options, where)
    arrow = require_pyarrow(where)
    groups = RowGroups(folder.open(name))
    field = groups.schema.field(column_of(groups.schema, options, arrow, where))
    return groups, dtype_of(field.type.value_type), DecoderRecord(kind="parquet", column=field.name)


PARQUET: Final = TokenFormat("parquet", _files, _scan, _stored)
