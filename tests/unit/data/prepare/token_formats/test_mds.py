"""Mosaic MDS: the scan finds each sample's ids in shards of the published layout, and refuses what is damaged."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill.data.prepare.token_formats.mds import MDS
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenScan
from megadistill.data.storage.local import LocalFolder
from megadistill.errors import UserError
from tests.unit.data.prepare.token_formats.mds_files import shard_bytes, write_mds

LENGTHS = (3, 400, 1, 70_000, 5)
"""Of one byte, of two and of four."""


def documents(dtype: str, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(len(lengths))
    return [random.integers(0, 120, length).astype(dtype) for length in lengths]


def scan(path: Path, **options: Any) -> TokenScan:
    return MDS.scan(LocalFolder(path.parent), path.name, ScanOptions(vocab_size=1000, **options))


def ids_of(path: Path, found: TokenScan) -> list[int]:
    """The ids in the segments of a scan, as they lie in the file."""
    data, dtype = path.read_bytes(), np.dtype(found.dtype).newbyteorder("<")
    parts = [np.frombuffer(data, dtype, count, begin) for begin, count in found.segments_G2.tolist()]
    return [int(id) for part in parts for id in part]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64"])
@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:{}"])
def test_the_ids_of_arrays_are_located(tmp_path: Path, dtype: str, encoding: str) -> None:
    arrays = documents(dtype)
    samples = [{"id": f"é{number}", "tokens": ids, "n": len(ids)} for number, ids in enumerate(arrays)]
    encodings = {"id": "str", "tokens": encoding.format(dtype), "n": "int"}
    path = write_mds(tmp_path / "a", encodings, [samples]) / "shard.00000.mds"
    found = scan(path)
    assert found.dtype == dtype
    assert ids_of(path, found) == np.concatenate(arrays).tolist()
    assert found.starts_D is not None
    assert found.starts_D.tolist() == [0, 3, 403, 404, 70_404]


def test_the_ids_of_bytes_need_their_dtype(tmp_path: Path) -> None:
    arrays = documents("int64", (4, 0, 9))
    samples = [{"tokens": ids.tobytes()} for ids in arrays]
    path = write_mds(tmp_path / "a", {"tokens": "bytes"}, [samples]) / "shard.00000.mds"
    found = scan(path, dtype="int64")
    assert ids_of(path, found) == np.concatenate(arrays).tolist()
    assert found.starts_D is not None
    assert found.starts_D.tolist() == [0, 4], "a sample without ids is no document"
    with pytest.raises(UserError, match="do not tell their type: give --dtype"):
        scan(path)
    (tmp_path / "a" / "shard.00000.mds").write_bytes(shard_bytes({"tokens": "bytes"}, [{"tokens": b"123"}]))
    with pytest.raises(UserError, match=r"sample 0: expected whole ids of int64, found 3 bytes"):
        scan(path, dtype="int64")


def test_a_type_of_bytes_half_as_wide_as_theirs_is_noticed(tmp_path: Path) -> None:
    """Its ids would be those of the tokenizer, with zeros between them."""
    samples = [{"tokens": ids.tobytes()} for ids in documents("int64", (60, 1, 100))]
    path = write_mds(tmp_path / "a", {"tokens": "bytes"}, [samples]) / "shard.00000.mds"
    for dtype, wider in (("int32", "int64"), ("uint32", "int64"), ("uint16", "uint32")):
        with pytest.raises(UserError, match=f"mds: every second {dtype} is the upper half of an id: .* {wider}$"):
            scan(path, dtype=dtype)
    assert scan(path, dtype="int64").segments_G2[:, 1].tolist() == [60, 1, 100]


def test_rows_of_one_length_are_pieces_whose_documents_the_ids_tell(tmp_path: Path) -> None:
    arrays = documents("uint16", (8, 8, 8))
    for encoding in ("ndarray:uint16:8", "ndarray:uint16"):
        path = write_mds(tmp_path / encoding, {"tokens": encoding}, [[{"tokens": ids} for ids in arrays]])
        found = scan(path / "shard.00000.mds")
        assert found.starts_D is None
        assert ids_of(path / "shard.00000.mds", found) == np.concatenate(arrays).tolist()
        assert len(found.segments_G2) == (1 if encoding.endswith(":8") else 3), "what touches is one segment"


def test_the_column_is_the_given_one_or_the_usual_one(tmp_path: Path) -> None:
    samples = [{"input_ids": np.arange(3, dtype="int32"), "text": "abc", "weights": np.ones(3, dtype="float16")}]
    encodings = {"input_ids": "ndarray:int32", "text": "str", "weights": "ndarray"}
    path = write_mds(tmp_path / "a", encodings, [samples]) / "shard.00000.mds"
    assert ids_of(path, scan(path)) == ids_of(path, scan(path, column="input_ids")) == [0, 1, 2]
    for column, message in (
        ("ids", "has no column 'ids': give --column, one of 'input_ids', 'text', 'weights'"),
        ("text", "column 'text' is 'str', and ids are an ndarray of integers, or bytes"),
        ("weights", "expected an array of integers, found code 18 of a dtype"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            scan(path, column=column)
        assert str(path) in str(refused.value)


def test_arrays_of_two_dtypes_or_axes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.00000.mds"
    ids = np.arange(6)
    path.write_bytes(shard_bytes({"tokens": "ndarray"}, [{"tokens": ids.astype("int32")}, {"tokens": ids}]))
    with pytest.raises(UserError, match="sample 1: expected code 33 of a dtype, as in sample 0, found 65"):
        scan(path)
    path.write_bytes(shard_bytes({"tokens": "ndarray"}, [{"tokens": ids.reshape(2, 3)}]))
    with pytest.raises(UserError, match="sample 0: expected an array of one axis, found 2 axes"):
        scan(path)


def test_every_cut_and_every_changed_count_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "shard.00000.mds"
    arrays = documents("int32", (3, 300, 5))
    encodings = {"id": "str", "tokens": "ndarray"}
    whole = shard_bytes(encodings, [{"id": "abc", "tokens": ids} for ids in arrays])
    begins = np.frombuffer(whole, "<u4", 4, 4).tolist()
    places = [0, 4, 8, 12, 16, *(begin + word for begin in begins[:3] for word in (0, 4))]
    changed = [
        whole[:place] + struct.pack("<I", value) + whole[place + 4 :] for place in places for value in (0, 9, 1 << 31)
    ]
    axes = begins[1] + 8 + 3
    changed += [whole[: axes + at] + b"\x07" + whole[axes + at + 1 :] for at in range(3)]
    cuts = [whole[:length] for length in (1, 3, 4, 19, 20, 25, begins[0], begins[0] + 9, len(whole) - 1)]
    for content in (*cuts, *changed, whole + b"\0", b"\0" * 64, b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(UserError) as refused:
            scan(path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_files_are_those_of_the_index(tmp_path: Path) -> None:
    samples = [{"tokens": np.arange(3)}]
    folder = write_mds(tmp_path / "a", {"tokens": "ndarray"}, [samples] * 3)
    (folder / "shard.00009.mds").write_bytes(b"a leftover")
    expected = [f"{folder}/shard.0000{number}.mds" for number in range(3)]
    assert MDS.files(str(folder)) == MDS.files(f"{folder}/index.json") == MDS.files(f"{folder}/") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("version"), "version: Field required"),
        (lambda index: index.update(version=3), "version: Input should be 2"),
        (lambda index: index.update(shards=[]), "shards: List should have at least 1 item"),
        (lambda index: index["shards"][0].update(format="json"), r"shards\.0\.format: Input should be 'mds'"),
        (lambda index: index["shards"][0]["raw_data"].update(basename="7/shard.00000.mds"), "joins several folders"),
    ],
)
def test_an_index_of_another_form_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = write_mds(tmp_path / "a", {"tokens": "ndarray"}, [[{"tokens": np.arange(3)}]])
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as refused:
        MDS.files(str(folder))
    assert "\n" not in str(refused.value)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json cannot be read: No such file"):
        MDS.files(str(tmp_path))
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json cannot be read: Expecting"):
        MDS.files(str(tmp_path))


def test_compressed_shards_are_refused_until_they_lie_there_decompressed(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "a", {"tokens": "ndarray"}, [[{"tokens": np.arange(3)}]])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {"compression": "zstd", "zip_data": {"basename": "shard.00000.mds.zstd", "bytes": 9}}
    (folder / "index.json").write_text(json.dumps(index))
    raw = folder / "shard.00000.mds"
    assert MDS.files(str(folder)) == [str(raw)]
    raw.rename(folder / "shard.00000.mds.zstd")
    with pytest.raises(
        UserError, match=r"mds\.zstd is compressed as a whole.* as shard\.00000\.mds; index\.json stays"
    ):
        MDS.files(str(folder))
