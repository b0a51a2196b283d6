"""Data sets as `save_to_disk` of Hugging Face `datasets` writes them: Arrow streams and a state.json."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.ipc


def write_stream(path: Path, table: pyarrow.Table, *, rows: int = 1000, compression: str | None = None) -> Path:
    """An Arrow stream with `rows` rows in a record batch."""
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with open(path, "wb") as file, pyarrow.RecordBatchStreamWriter(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_set(folder: Path, tables: Sequence[pyarrow.Table], *, rows: int = 1000) -> Path:
    """A saved data set, one file for each table."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        write_stream(folder / name, table, rows=rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
