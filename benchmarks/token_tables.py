"""The benchmark's tokens in tables of other programs (MDS, Arrow, parquet), and the readers of their own libraries."""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from megadistill.data.shards.manifest import TokenFormatName

Tokens = NDArray[np.uint16]
Rows = Iterator[NDArray[Any]]

BATCH = 256
COLUMN = "tokens"
ROWS_A_GROUP = 512
"""Rows of a row group of parquet: a million ids, which a reader decodes as a whole."""
FILE_ROWS = 8192


def mosaic_streaming() -> Any:
    return importlib.import_module("streaming")


def write_mds(folder: Path, tokens: Tokens) -> Path:
    """Raises ImportError: mosaic-streaming is not installed."""
    columns = {COLUMN: f"ndarray:uint16:{tokens.shape[1]}"}
    with mosaic_streaming().MDSWriter(out=str(folder / "mosaic"), columns=columns) as writer:
        for row in tokens:
            writer.write({COLUMN: row})
    return folder / "mosaic"


def write_arrow(folder: Path, tokens: Tokens) -> Path:
    """Writes the files that `save_to_disk` of `datasets` would write."""
    saved = folder / "saved"
    saved.mkdir()
    parts = [tokens[start : start + FILE_ROWS] for start in range(0, len(tokens), FILE_ROWS)]
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        table = _table(part)
        with pyarrow.OSFile(str(saved / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    plain: dict[str, Any] = {
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
    }
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train", **plain}
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "dataset_info.json").write_text("{}")
    return saved


def write_parquet(folder: Path, tokens: Tokens) -> Path:
    path = folder / "parquet"
    path.mkdir()
    for number, start in enumerate(range(0, len(tokens), FILE_ROWS)):
        table = _table(tokens[start : start + FILE_ROWS])
        pyarrow.parquet.write_table(table, path / f"part-{number:05d}.parquet", row_group_size=ROWS_A_GROUP)
    return path


def _table(tokens: Tokens) -> Any:
    offsets = np.arange(len(tokens) + 1, dtype=np.int32) * tokens.shape[1]
    return pyarrow.table({COLUMN: pyarrow.ListArray.from_arrays(offsets, pyarrow.array(tokens.reshape(-1)))})


def mosaic_rows(folder: Path) -> Rows:
    """Rows as mosaic-streaming shuffles them."""
    dataset = mosaic_streaming().StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return (sample[COLUMN] for sample in dataset)


def datasets_rows(folder: Path) -> Rows:
    """Rows at random."""
    dataset = importlib.import_module("datasets").load_from_disk(str(folder)).with_format("numpy")
    return (dataset[i][COLUMN] for i in np.random.default_rng(1).permutation(len(dataset)).tolist())


def pyarrow_rows(folder: Path) -> Rows:
    """Rows in the order of the files, a row group at a time: at random each row would cost a row group."""
    for path in sorted(folder.iterdir()):
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            for chunk in file.read_row_group(group, columns=[COLUMN], use_threads=False).column(0).chunks:
                yield from chunk.flatten().to_numpy().reshape(len(chunk), -1)


@dataclass(frozen=True)
class TokenTable:
    """A format of tables, and the reader of its own library."""

    format: TokenFormatName
    write: Callable[[Path, Tokens], Path]
    """Raises ImportError: its library is not installed."""
    reader: str
    library: str
    rows: Callable[[Path], Rows]


TABLES = (
    TokenTable("mds", write_mds, "mosaic-streaming", "streaming", mosaic_rows),
    TokenTable("arrow", write_arrow, "datasets, at random", "datasets", datasets_rows),
    TokenTable("parquet", write_parquet, "pyarrow's parquet, in order", "pyarrow", pyarrow_rows),
)
