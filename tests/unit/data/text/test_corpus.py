"""The same documents from every kind of file; what is left out is counted, what is damaged is refused."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from backports import zstd

from megadistill.data.text import compressed, corpus, table_rows
from megadistill.data.text.corpus import Corpus
from megadistill.data.text.input_files import find_files
from megadistill.data.text.left_out import LeftOut, first_of, in_words, listed
from megadistill.errors import UserError
from tests.unit.data.text.tars import write_tar

TEXTS = ["one\n", "zwei\r\nZeilen, \u2028 und \x00", "三 🙂\ttabs", "  spaces  ", "x" * 5000]


def _lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _rows(values: list[Any]) -> list[dict[str, Any]]:
    return [{"id": i, "text": value} for i, value in enumerate(values)]


def _write_jsonl(folder: Path, texts: list[str]) -> None:
    (folder / "a.jsonl").write_bytes(_lines(_rows(texts[:2])))
    (folder / "b.JSONL").write_bytes(_lines(_rows(texts[2:])).rstrip(b"\n"))


def _write_gzip(folder: Path, texts: list[str]) -> None:
    (folder / "a.json.gz").write_bytes(gzip.compress(_lines(_rows(texts[:2]))))
    members = [gzip.compress(_lines([row])) for row in _rows(texts[2:])]
    (folder / "b.jsonl.gz").write_bytes(b"".join(members))


def _write_zstd(folder: Path, texts: list[str]) -> None:
    (folder / "a.json.zst").write_bytes(zstd.compress(_lines(_rows(texts[:2]))))
    widest: dict[int, int] = {
        zstd.CompressionParameter.window_log: 31,
        zstd.CompressionParameter.content_size_flag: False,
    }
    frames = [zstd.compress(_lines([row]), options=widest) for row in _rows(texts[2:])]
    (folder / "b.jsonl.zst").write_bytes(b"".join(frames))


def _write_parquet(folder: Path, texts: list[str]) -> None:
    for i, kind in enumerate((pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view())):
        part = texts[i : i + 1] if i < 3 else texts[3:]
        table = pyarrow.table({"id": range(len(part)), "text": pyarrow.array(part).cast(kind)})
        pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=1)


def _write_arrow(folder: Path, texts: list[str]) -> None:
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view())
    for i, kind in enumerate(kinds):
        part = texts[i : i + 1] if i < 3 else texts[3:]
        column = pyarrow.array(part).cast(kind)
        table = pyarrow.table({"id": range(len(part)), "text": column.dictionary_encode() if i == 2 else column})
        writer = pyarrow.ipc.new_file if i % 2 else pyarrow.ipc.new_stream
        with writer(folder / f"{i}.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=1)


def _write_tar(folder: Path, texts: list[str]) -> None:
    plain = {
        "0.txt": texts[0].encode(),
        "0.json": b"not read",
        "0.jpg": b"\xff",
        "1.TXT.gz": gzip.compress(texts[1].encode()),
    }
    record = [json.dumps({"text": text}).encode() for text in texts]
    others = {"d.ir/2.json": record[2], "d.ir/2.cls": b"7", "d.ir/3.json.gz": gzip.compress(record[3])}
    write_tar(folder / "a.tar", plain | others)
    write_tar(folder / "b.tar", {"README": b"left out", "4.json.zst": zstd.compress(record[4])})


def _write_files(folder: Path, texts: list[str]) -> None:
    for i, text in enumerate(texts):
        data = text.encode()
        forms = {".txt": data, ".txt.gz": gzip.compress(data), ".zst": zstd.compress(data)}
        suffix = list(forms)[i % len(forms)]
        (folder / f"{i}{suffix}").write_bytes(forms[suffix])


NOWHERE = Path("nowhere")
"""The output of a corpus that is only read."""

WRITERS = [_write_jsonl, _write_gzip, _write_zstd, _write_parquet, _write_arrow, _write_tar, _write_files]


def _read(folder: Path, **options: Any) -> tuple[list[str], Corpus]:
    read = Corpus(find_files([folder], ["*"], [], output=NOWHERE), **{"text_field": "text"} | options)
    return [document.text for document in read], read


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_gives_the_same_documents(write: Callable[[Path, list[str]], None], tmp_path: Path) -> None:
    write(tmp_path, TEXTS)
    texts, read = _read(tmp_path)
    assert texts == TEXTS
    assert not read.left_out
    assert read.bytes_read == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("write", WRITERS)
def test_bytes_read_never_goes_back_and_says_how_far_a_pass_is(
    write: Callable[[Path, list[str]], None], tmp_path: Path
) -> None:
    write(tmp_path, TEXTS)
    read = Corpus(find_files([tmp_path], ["*"], [], output=NOWHERE), text_field="text")
    seen = [read.bytes_read for _ in read]
    assert seen == sorted(seen)
    assert seen[-1] <= read.bytes_read


def test_what_is_no_document_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        _lines(["a string", None, {"text": 3}, {"body": "x"}, {"text": None}, {"text": " \n"}, {"text": "kept"}])
        + b'\n   \n{"text": "cut\n{"text": "caf\xe9"}\n{"text": "\\ud83d"}\n'
        + b"[" * 100_000
        + b"\n"
        + b"9" * 5000
    )
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b" \n\t")
    texts, read = _read(tmp_path)
    assert texts == ["kept"]
    assert read.left_out == {LeftOut.NOT_JSON: 5, LeftOut.NO_TEXT: 3, LeftOut.EMPTY: 2, LeftOut.INVALID: 3}
    assert in_words(read.left_out) == (
        "2 empty documents, 3 documents that are not UTF-8, 5 lines that are not a JSON object, "
        "3 records without the text field"
    )


def test_rows_of_parquet_are_counted_alike(tmp_path: Path) -> None:
    values = pyarrow.array([b"kept", None, b" ", b"caf\xe9"], type=pyarrow.binary())
    unchecked = pyarrow.Array.from_buffers(pyarrow.string(), 4, values.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": unchecked}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"] * 3}), tmp_path / "c.parquet")
    texts, read = _read(tmp_path)
    assert texts == ["kept"]
    assert read.left_out == {LeftOut.NO_TEXT: 6, LeftOut.EMPTY: 1, LeftOut.INVALID: 1}


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines([{"body": "one"}]))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["two"], "text": ["no"]}), tmp_path / "b.parquet")
    assert _read(tmp_path, text_field="body")[0] == ["one", "two"]


def test_a_corpus_without_documents_is_refused_with_counts_and_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines([{"body": "one", "id": 1}, {"title": "two"}, 5]))
    texts, read = _read(tmp_path)
    assert texts == []
    message = str(read.no_documents())
    assert "1 line that is not a JSON object, 2 records without the text field" in message
    assert "the fields are 'body', 'id', 'title', name one with --text-field" in message
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert "the files hold no document" in str(_read(tmp_path)[1].no_documents())


def test_a_document_above_the_bound_is_counted_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(table_rows, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(corpus, "_SKIP_BYTES", 7)
    long = "y" * 1000
    (tmp_path / "a.jsonl").write_bytes(_lines(_rows([long, "after", "long last" * 99])).rstrip(b"\n"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(long.encode()))
    (tmp_path / "c.txt").write_bytes(b"z" * 100)
    pyarrow.parquet.write_table(pyarrow.table({"text": [long, "row"]}), tmp_path / "d.parquet")
    texts, read = _read(tmp_path)
    assert texts == ["after", "z" * 100, "row"]
    assert read.left_out == Counter({LeftOut.TOO_LONG: 4})


def _arrow_bytes(tmp_path: Path) -> bytes:
    path, table = tmp_path / "whole", pyarrow.table({"text": TEXTS * 50})
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, max_chunksize=100)
    data = path.read_bytes()
    path.unlink()
    return data


def _parquet_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "whole"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS * 50}), path, write_page_checksum=True)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("size", [0, 2, 40, 0.5, -8, -5, -1])
def test_a_file_that_is_cut_off_is_refused_wherever_the_cut_is(name: str, size: float, tmp_path: Path) -> None:
    text = _lines(_rows(TEXTS * 50))
    data = {
        "gz": gzip.compress(text),
        "zst": zstd.compress(text),
        "parquet": _parquet_bytes(tmp_path),
        "arrow": _arrow_bytes(tmp_path),
    }[name.rpartition(".")[2]]
    (tmp_path / name).write_bytes(data[: int(size * len(data)) if isinstance(size, float) else size])
    with pytest.raises(UserError, match=rf"{name} is damaged or cut off") as refused:
        _read(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_flipped_byte_in_the_middle_is_refused(name: str, tmp_path: Path) -> None:
    checked: dict[int, int] = {zstd.CompressionParameter.checksum_flag: True}
    text = _lines(_rows(TEXTS * 50))
    whole = {
        "gz": gzip.compress(text),
        "zst": zstd.compress(text, options=checked),
        "parquet": _parquet_bytes(tmp_path),
    }[name.rpartition(".")[2]]
    middle = whole.find(b"tabs") if name == "a.parquet" else len(whole) // 2
    (tmp_path / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        _read(tmp_path)


def test_an_input_that_is_not_there_or_matches_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="nowhere does not exist"):
        list(find_files([tmp_path / "a.txt", tmp_path / "nowhere"], ["*"], [], output=NOWHERE))
    with pytest.raises(UserError, match=r"matches --include \*\.md and not --exclude a\*"):
        list(find_files([tmp_path], ["*.md"], ["a*"], output=NOWHERE))
    with pytest.raises(UserError, match=r"\*\.txt matches no file: give files"):
        list(find_files([tmp_path / "none" / "*.txt"], ["*"], [], output=NOWHERE))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no file in .*empty: give files"):
        list(find_files([tmp_path / "empty"], ["*"], [], output=NOWHERE))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is neither a file nor a folder"):
        list(find_files([tmp_path / "pipe"], ["*"], [], output=NOWHERE))


def test_each_file_without_text_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines([{"body": "one", "id": 1}, {"title": "two"}]))
    (tmp_path / "b.jsonl").write_bytes(_lines(["kept", {"text": "kept"}]))
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "d.txt").write_bytes(b" ")
    (tmp_path / "e.csv.jsonl").write_bytes(b"id,text\n1,one\n")
    (tmp_path / "f\x1b[1m.txt").write_bytes("é".encode("utf-16"))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "text": [1]}), tmp_path / "g.parquet")
    _, read = _read(tmp_path)
    lines = {str(file).partition(" (")[0].rpartition("/")[2]: str(file).partition("): ")[2] for file in read.unread}
    invalid = "it is not UTF-8: no text, or in another encoding (iconv -f ENCODING -t UTF-8 converts it)"
    assert lines == {
        "a.jsonl": "its fields are 'body', 'id', 'title'",
        "c.png": invalid,
        "e.csv.jsonl": "2 lines that are not a JSON object",
        "f\ufffd[1m.txt": invalid,
        "g.parquet": "its fields are 'body', 'text' (which is not text)",
    }
    assert len(listed(read.unread, 3)) == 4
    assert listed(read.unread, 3)[-1].startswith("2 more files (")


def test_a_byte_order_mark_does_not_hide_a_line(tmp_path: Path) -> None:
    """Which Windows programs write at the beginning of a file."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + _lines([{"text": "one"}, {"text": "two"}]))
    assert _read(tmp_path)[0] == ["one", "two"]


def test_copies_have_one_digest(tmp_path: Path) -> None:
    for write in WRITERS:
        write(tmp_path, TEXTS)
    digests = {
        document.digest for document in Corpus(find_files([tmp_path], ["*"], [], output=NOWHERE), text_field="text")
    }
    assert len(digests) == len(TEXTS)


@pytest.mark.parametrize("store_schema", [True, False], ids=["dictionary", "plain"])
def test_a_text_that_many_rows_share_is_not_copied_for_each_of_them(
    store_schema: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few kilobytes, of 5 GB of text."""
    monkeypatch.setattr(table_rows, "MAX_DOCUMENT_BYTES", 1000)
    texts = pyarrow.array(["x" * (16 << 20), "short"])
    rows = pyarrow.array([0] * 300 + [1, None], type=pyarrow.int32())
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(rows, texts)})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 10_000
    documents, read = _read(tmp_path)
    assert documents == ["short"]
    assert read.left_out == {LeftOut.TOO_LONG: 300, LeftOut.NO_TEXT: 1}
    assert pyarrow.default_memory_pool().max_memory() < 512 << 20, "a batch of 128 rows has 2 GB"


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.jsonl.gz"])
def test_a_few_bytes_that_expand_without_an_end_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "_EXPANSION_COUNTS_FROM", 1 << 16)
    monkeypatch.setattr(compressed, "MAX_EXPANSION", 500)
    data = bytes(32 << 20)
    (tmp_path / name).write_bytes(gzip.compress(data, 9) if name.endswith("gz") else zstd.compress(data))
    with pytest.raises(UserError, match=r"expands to more than 500 times its size.*--exclude it"):
        _read(tmp_path)


def test_a_file_that_is_one_document_too_long_is_named_with_what_cuts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "book.txt").write_bytes(b"a line\n" * 100)
    (tmp_path / "a.txt").write_bytes(b"short")
    read = _read(tmp_path)[1]
    with pytest.raises(UserError, match=r"book.txt .*1 document longer than 64 MiB \(`split -C 16m` cuts"):
        read.refuse_mostly_unread(705)


def test_the_first_text_that_is_left_out_has_its_place(tmp_path: Path) -> None:
    """A file without any document is named as a whole."""
    (tmp_path / "a.jsonl").write_bytes(_lines([{"text": "kept"}]) + b'\n{"text": "caf\xe9"}\n{"text": "\xe9"}\n{}\n')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    table = pyarrow.table({"text": pyarrow.array(["kept", " ", None, b"\xe9"], type=pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    write_tar(tmp_path / "d.tar", {"x/1.txt": b"kept", "x/2.json": b"[1]", "x/3.txt": b"\xe9"})
    read = _read(tmp_path)[1]
    assert read.left_out == {LeftOut.INVALID: 5, LeftOut.NO_TEXT: 2, LeftOut.EMPTY: 1, LeftOut.NOT_JSON: 1}
    assert first_of(read.first_places) == [
        f"  the first of the documents that are not UTF-8: {tmp_path}/a.jsonl, line 3",
        f"  the first of the lines that are not a JSON object: {tmp_path}/d.tar, sample 'x/2' at byte 1024",
        f"  the first of the records without the text field: {tmp_path}/a.jsonl, line 5",
    ]
    assert [file.path.name for file in read.unread] == ["b.txt"]
    (tmp_path / "a.jsonl").unlink()
    assert _read(tmp_path)[1].first_places[LeftOut.NO_TEXT] == f"{tmp_path}/c.parquet, row 3"
