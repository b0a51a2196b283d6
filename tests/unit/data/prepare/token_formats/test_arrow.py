"""Saved data sets of Hugging Face: the scan finds the ids of each record batch in the streams, and refuses the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pytest

from megadistill.data.prepare.token_formats.arrow import ARROW
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenScan
from megadistill.data.storage.local import LocalFolder
from megadistill.errors import UserError
from tests.unit.data.prepare.token_formats.saved_sets import write_set, write_stream
from tests.unit.data.prepare.token_formats.test_mds import ids_of

ROWS = [[3, 1, 4], [], [1, 5, 9, 2], [6], [5, 3]]
STARTS = [0, 3, 7, 8]
LISTS = {"list": pyarrow.list_, "large_list": pyarrow.large_list}


def scan(path: Path, **options: Any) -> TokenScan:
    return ARROW.scan(LocalFolder(path.parent), path.name, ScanOptions(vocab_size=1000, **options))


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        scan(path, **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "uint32", "int64"])
def test_the_ids_of_lists_are_located_in_every_record_batch(tmp_path: Path, dtype: str, kind: str) -> None:
    type_ = LISTS[kind](getattr(pyarrow, dtype)())
    table = pyarrow.table(
        {"text": ["a" * len(row) for row in ROWS], "input_ids": pyarrow.array(ROWS, type_), "mask": ROWS}
    )
    path = write_stream(tmp_path / "a.arrow", table, rows=2)
    found = scan(path)
    assert found.dtype == dtype
    assert found.decoder is None
    assert ids_of(path, found) == [id for row in ROWS for id in row]
    assert found.starts_D is not None
    assert found.starts_D.tolist() == STARTS
    assert len(found.segments_G2) == 3


def test_a_slice_of_a_table_is_located_without_what_was_cut_off(tmp_path: Path) -> None:
    table = pyarrow.table({"input_ids": pyarrow.array(ROWS, pyarrow.list_(pyarrow.int32()))})
    path = write_stream(tmp_path / "a.arrow", table.slice(2, 2))
    assert ids_of(path, scan(path)) == [1, 5, 9, 2, 6]


def test_lists_of_one_length_are_pieces_whose_documents_the_ids_tell(tmp_path: Path) -> None:
    rows = np.arange(24).reshape(6, 4).tolist()
    for type_ in (pyarrow.list_(pyarrow.int32(), 4), pyarrow.list_(pyarrow.int32())):
        path = write_stream(tmp_path / "a.arrow", pyarrow.table({"tokens": pyarrow.array(rows, type_)}), rows=4)
        found = scan(path)
        assert ids_of(path, found) == list(range(24))
        assert found.starts_D is None


def test_columns_that_hold_no_lists_of_integers_are_refused(tmp_path: Path) -> None:
    columns = {"input_ids": [[1.0], [2.0]], "nested": [[[1]], [[2]]], "flat": [1, 2], "text": ["a", "b"]}
    path = write_stream(tmp_path / "a.arrow", pyarrow.table(columns))
    refused(path, "column 'input_ids' is list<item: double>, and ids are lists of integers: give --column, one of")
    for column, kind in (("nested", "list<item: list<item: int64>>"), ("flat", "int64"), ("text", "string")):
        refused(path, f"column '{column}' is {kind}", column=column)
    refused(path, "has no column 'ids': give --column, one of 'input_ids', 'nested', 'flat', 'text'", column="ids")
    refused(path, "tells the type of its ids: leave it out", dtype="uint16")
    write_stream(path, pyarrow.table([[[1]], [[2]]], names=["input_ids", "tokens"]))
    refused(path, "2 columns 'input_ids' or 'tokens': give --column")
    assert ids_of(path, scan(path, column="tokens")) == [2]


def test_nulls_are_refused_with_their_number(tmp_path: Path) -> None:
    int32 = pyarrow.list_(pyarrow.int32())
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"input_ids": pyarrow.array([[1], None, [2]], int32)}))
    refused(path, "record batch 0: 1 of 3 rows are null: save the data set without them")
    write_stream(path, pyarrow.table({"input_ids": pyarrow.array([[1, None], [None]], int32)}))
    refused(path, "record batch 0: 2 of 3 ids are null")


def test_what_does_not_lie_in_the_file_as_it_is_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"input_ids": pyarrow.array([list(range(5000))], pyarrow.list_(pyarrow.int32()))})
    path = tmp_path / "a.arrow"
    for compression in ("zstd", "lz4"):
        write_stream(path, table, compression=compression)
        refused(path, "record batch 0 is compressed, or of another byte order, and cannot be read in place")
    pyarrow.feather.write_feather(table, str(path), compression="uncompressed")
    refused(path, "is not a whole Arrow stream")


def test_every_cut_is_refused_and_no_changed_byte_leads_out_of_the_file(tmp_path: Path) -> None:
    table = pyarrow.table({"input_ids": pyarrow.array(ROWS, pyarrow.list_(pyarrow.int32()))})
    path = write_stream(tmp_path / "a.arrow", table, rows=3)
    whole = path.read_bytes()
    for length in (*range(1, len(whole), 24), len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "is not a whole Arrow stream")
    random, refusals = np.random.default_rng(0), []
    for place in random.integers(0, len(whole), 250).tolist():
        path.write_bytes(whole[:place] + bytes([int(random.integers(256))]) + whole[place + 1 :])
        try:
            ids_of(path, scan(path))
        except UserError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 250, "changed ids are no fault of the stream"
    assert not any("\n" in line for line in refusals)


def test_files_are_those_of_the_state(tmp_path: Path) -> None:
    table = pyarrow.table({"input_ids": ROWS})
    folder = write_set(tmp_path / "a", [table, table])
    (folder / "cache-0123.arrow").write_bytes(b"rows of a map")
    expected = [f"{folder}/data-0000{number}-of-00002.arrow" for number in range(2)]
    assert ARROW.files(str(folder)) == ARROW.files(f"{folder}/state.json") == expected


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("state.json", {"_data_files": []}, r"state\.json: expected the names of files as _data_files, found '\[\]'"),
        ("state.json", {"_data_files": [{"filename": "../b.arrow"}]}, "expected the names of files"),
        ("state.json", {"_data_files": ["a.arrow"]}, "expected the names of files"),
        ("state.json", [], "expected the names of files"),
        (
            "state.json",
            {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]},
            r"rows are chosen by a file of row numbers: .*flatten_indices\(\)",
        ),
        ("dataset_dict.json", {"splits": ["train", "test"]}, "several splits: index each by itself: .*/train, .*/test"),
        ("dataset_dict.json", {}, r"state\.json cannot be read: No such file"),
        ("dataset_info.json", {}, r"state\.json cannot be read: No such file"),
    ],
)
def test_folders_of_another_form_are_refused(tmp_path: Path, name: str, values: Any, message: str) -> None:
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        ARROW.files(str(tmp_path))
    assert "\n" not in str(error.value)


def test_datasets_reads_the_same_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[oracles]'")
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "text": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_dict({"input_ids": ROWS * 20, "text": ["a"] * 100}, features=features)
    rows.shuffle(seed=1).select(range(60)).save_to_disk(str(tmp_path / "a"), num_shards=2)
    files = [Path(file) for file in ARROW.files(str(tmp_path / "a"))]
    ids = [id for file in files for id in ids_of(file, scan(file))]
    assert ids == [id for row in datasets.load_from_disk(str(tmp_path / "a"))["input_ids"] for id in row]
