"""Texts in Arrow files, and the folders that Hugging Face `datasets` writes (`save_to_disk`)."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megadistill.data.text.corpus import Corpus
from megadistill.data.text.input_files import find_files
from megadistill.data.text.left_out import LeftOut
from megadistill.errors import UserError

NOWHERE = Path("nowhere")


def _write_stream(path: Path, table: Any, *, rows: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, max_chunksize=rows)


def save_to_disk(folder: Path, texts: list[str], *, files: int = 2, **state: Any) -> None:
    """The files that `datasets` writes for a data set of a column `text`."""
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    features = {"text": {"dtype": "string", "_type": "Value"}}
    for i, name in enumerate(names):
        part = texts[len(texts) * i // files : len(texts) * (i + 1) // files]
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        _write_stream(folder / name, pyarrow.table({"text": part}).replace_schema_metadata(metadata))
    listed: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "a" * 16,
        "_split": "train",
    }
    listed |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(listed | state))
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "features": features}))


def _read(folder: Path, *, include: list[str] | None = None) -> tuple[list[str], Corpus]:
    read = Corpus(find_files([folder], include or ["*"], [], output=NOWHERE), text_field="text")
    return [document.text for document in read], read


def test_a_folder_of_datasets_has_the_rows_of_the_files_that_its_state_names(tmp_path: Path) -> None:
    """Not those of cached results, which hold the same rows again, and none of its JSON files is a document."""
    texts = ["one", "two", "three", "four", "five"]
    save_to_disk(tmp_path / "data", texts)
    _write_stream(tmp_path / "data" / "cache-0123456789abcdef.arrow", pyarrow.table({"text": texts}))
    documents, read = _read(tmp_path / "data")
    assert documents == texts
    assert not read.left_out
    assert not read.whole
    assert _read(tmp_path / "data", include=["*-00001-of-*"])[0] == texts[2:]


def test_the_splits_of_a_folder_are_read_in_order_or_chosen(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "test", ["b"], files=1)
    save_to_disk(tmp_path / "train", ["c", "d"], files=1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert _read(tmp_path)[0] == ["b", "c", "d"]
    assert _read(tmp_path, include=["train/*"])[0] == ["c", "d"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"lacks 'gone\.arrow', which its state\.json names"),
        ({"_data_files": [{"filename": "../secret.arrow"}]}, r"lacks '\.\./secret\.arrow'"),
        ({"_data_files": [5]}, "lacks None"),
        ({"_data_files": "x"}, "names no files of rows"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, r"flatten_indices\(\)"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_to_disk(tmp_path, ["one"], **state)
    with pytest.raises(UserError, match=message) as refused:
        _read(tmp_path)
    assert "\n" not in str(refused.value)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        _read(tmp_path)


def test_rows_are_counted_as_those_of_parquet(tmp_path: Path) -> None:
    texts = pyarrow.array([b"kept", None, b" ", b"caf\xe9"], type=pyarrow.binary())
    unchecked = pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers(), null_count=1)
    _write_stream(tmp_path / "a.arrow", pyarrow.table({"text": unchecked}))
    _write_stream(tmp_path / "b.arrow", pyarrow.table({"text": [1, 2]}))
    _write_stream(tmp_path / "c.arrow", pyarrow.table({"body": ["x"] * 3, "list": [["text"]] * 3}))
    _write_stream(tmp_path / "d.arrow", pyarrow.table({"text": [["a list"]]}))
    documents, read = _read(tmp_path)
    assert documents == ["kept"]
    assert read.left_out == {LeftOut.NO_TEXT: 7, LeftOut.EMPTY: 1, LeftOut.INVALID: 1}
    assert read.first_places == {
        LeftOut.NO_TEXT: f"{tmp_path}/a.arrow, row 2",
        LeftOut.INVALID: f"{tmp_path}/a.arrow, row 4",
    }
    assert [file.fields for file in read.unread] == [
        ("'text' (which is not text)",), ("'body'", "'list'"), ("'text' (which is not text)",)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_offsets_that_lie_outside_of_the_file_are_refused(kind: str, tmp_path: Path) -> None:
    """Arrow files have no checksums: a flipped bit in an offset would be a read of any memory."""
    large = kind == "large_string"
    array = pyarrow.array(["one", "two"], type=pyarrow.large_string() if large else pyarrow.string())
    column = array.dictionary_encode() if kind == "dictionary" else array
    _write_stream(tmp_path / "a.arrow", pyarrow.table({"text": column}))
    data, width = (tmp_path / "a.arrow").read_bytes(), 8 if large else 4
    offsets = b"".join(n.to_bytes(width, "little") for n in (0, 3, 6))
    assert data.count(offsets) == 1
    bad = b"".join(n.to_bytes(width, "little") for n in (0, 1 << 29, 6))
    (tmp_path / "a.arrow").write_bytes(data.replace(offsets, bad))
    with pytest.raises(UserError, match=r"a\.arrow is damaged") as refused:
        _read(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_stream_that_ends_between_two_batches_is_refused(tmp_path: Path) -> None:
    """To Arrow's reader it is a shorter one."""
    path, table = tmp_path / "a.arrow", pyarrow.table({"text": ["one"]})
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)
        end = path.stat().st_size
        file.write_table(table)
    whole = path.read_bytes()
    for cut in (whole[: end or len(whole) - 8], whole + b"more", whole[:-8] + bytes(8)):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="is damaged or cut off"):
            _read(tmp_path)


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_a_name_of_a_column_that_is_not_utf8_is_damage(ending: str, tmp_path: Path) -> None:
    path, table = tmp_path / f"a.{ending}", pyarrow.table({"text": ["one", "two"]})
    if ending == "arrow":
        _write_stream(path, table)
    else:
        pyarrow.parquet.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xf8t"))
    with pytest.raises(UserError, match=rf"a\.{ending} is damaged or cut off \(.*codec can't decode") as refused:
        _read(tmp_path)
    assert "\n" not in str(refused.value)
