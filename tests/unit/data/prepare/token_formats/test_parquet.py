"""Parquet columns of ids: the scan counts the ids of every row group, which is decoded to the ids that were written."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megadistill.data.prepare.token_formats.formats import FORMATS
from megadistill.data.prepare.token_formats.parquet import PARQUET
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenScan
from megadistill.data.shards.token_files import parquet_parts
from megadistill.data.shards.token_files.decoded_parts import DECODERS
from megadistill.data.storage.local import LocalFolder, MappedFile
from megadistill.errors import UserError

ROWS = [[3, 1, 4], [], [1, 5, 9, 2], [6], [], []]
"""Of three row groups, the last of which is empty."""


def write(path: Path, rows: Any = ROWS, dtype: Any = None, **options: Any) -> Path:
    lists = pyarrow.array(rows, pyarrow.list_(dtype or pyarrow.int32()))
    table = pyarrow.table({"text": ["a"] * len(rows), "input_ids": lists})
    pyarrow.parquet.write_table(table, path, row_group_size=2, **options)
    return path


def scan(path: Path, **options: Any) -> TokenScan:
    return PARQUET.scan(LocalFolder(path.parent), path.name, ScanOptions(vocab_size=1000, **options))


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        scan(path, **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_row_groups_are_decoded_to_the_ids_that_were_written(tmp_path: Path, dtype: str, compression: str) -> None:
    path = write(tmp_path / "a.parquet", dtype=getattr(pyarrow, dtype)(), compression=compression)
    found = scan(path)
    assert found.dtype == dtype
    assert found.segments_G2.tolist() == [[0, 3], [1, 5]]
    assert found.starts_D is not None
    assert found.starts_D.tolist() == [0, 3, 7]
    assert found.decoder is not None
    file = MappedFile(path)
    decoded = [DECODERS["parquet"](file, part, found.decoder) for part in (1, 0, 2)]
    assert [ids.tolist() for ids in decoded] == [[1, 5, 9, 2, 6], [3, 1, 4], []]
    assert {ids.dtype.name for ids in decoded[:2]} == {dtype}


def test_lists_of_a_fixed_length_are_pieces_whose_documents_the_ids_tell(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"tokens": pyarrow.array(np.arange(12).reshape(3, 4).tolist(), pyarrow.list_(pyarrow.int64(), 4))}
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    found = scan(path)
    assert (found.starts_D, found.segments_G2.tolist()) == (None, [[0, 12]])


def test_columns_without_ids_and_missing_ids_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    refused(path, "column 'text' is string, and ids are lists of integers", column="text")
    refused(path, "no column 'ids': give --column, one of 'text', 'input_ids'", column="ids")
    refused(path, "leave it out", dtype="uint16")
    write(path, [[1], None, [2]])
    refused(path, "1 of 2 rows are null")
    write(path, [[1], [2, None]])
    refused(path, "1 of 3 ids are null")
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[[1, 2]]]}), path)
    refused(path, "column 'input_ids' is list<")


def test_a_row_group_too_large_to_decode_for_a_sequence_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_parts, "MAX_ROW_GROUP_IDS", 5)
    assert scan(path).segments_G2.tolist() == [[0, 3], [1, 5]]
    monkeypatch.setattr(parquet_parts, "MAX_ROW_GROUP_IDS", 4)
    refused(path, "a row group has more than the 4 ids allowed, .*: write .* smaller row groups")


def test_every_cut_and_every_changed_page_is_refused_in_one_line(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 999, (8, 50)).tolist()
    path = write(tmp_path / "a.parquet", rows, write_page_checksum=True, use_dictionary=False)
    whole = path.read_bytes()
    for length in (1, 4, 8, 50, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "not whole parquet")
    pages = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    refusals = 0
    for place in range(40, pages, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            scan(path)
        except UserError as error:
            refusals += "\n" not in str(error)
    assert refusals > 0.5 * len(range(40, pages, 97)), "those of the other column are not read"


def test_a_folder_means_its_parquet_files_in_order(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "README.md"):
        (tmp_path / name).write_bytes(b"")
    assert PARQUET.files(str(tmp_path)) == [f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"]
    assert PARQUET.files("s3://bucket/a.parquet") == ["s3://bucket/a.parquet"]
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"holds no \.parquet files"):
        PARQUET.files(str(tmp_path / "c"))


@pytest.mark.parametrize("name", ["arrow", "parquet"])
def test_without_pyarrow_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write(tmp_path / "a.parquet")
    load = builtins.__import__

    def without(module: str, *rest: Any) -> Any:
        if module.split(".")[0] == "pyarrow":
            raise ImportError(module)
        return load(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    scan_of = FORMATS["arrow" if name == "arrow" else "parquet"].scan
    with pytest.raises(UserError, match=rf"{path}: reading it needs pyarrow: pip install 'megadistill\[parquet\]'"):
        scan_of(LocalFolder(tmp_path), path.name, ScanOptions(vocab_size=1000))


def test_a_damaged_footer_ends_no_process(tmp_path: Path) -> None:
    """Of some damaged footers pyarrow ends the process when the counts of a column are read."""
    path = write(tmp_path / "a.parquet")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    footer, refusals = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), 0
    for place in random.integers(footer, len(whole), 200).tolist():
        path.write_bytes(whole[:place] + bytes([int(random.integers(256))]) + whole[place + 1 :])
        try:
            scan(path)
        except UserError as error:
            refusals += "\n" not in str(error)
    assert refusals > 50
