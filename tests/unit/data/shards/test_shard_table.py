"""Tables of shards: the same manifest in both forms, and one line for a table that is not the manifest's."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megadistill.data import Manifest, TokenStream
from megadistill.data.prepare.convert_manifest import convert
from megadistill.data.shards import hashed_record
from megadistill.data.shards.shard import Shard
from megadistill.data.shards.shard_table import NamePattern, ShardTable, TableRecord
from megadistill.data.storage.local import LocalFolder
from megadistill.errors import UserError
from tests.unit.data.servers import serving
from tests.unit.data.splits import random_sequences, write_split


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split with a table."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    write_split(folder, random_sequences(9, seed=0), per_shard=4)
    convert(folder, to="table")
    return folder


@pytest.fixture
def split(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "train"))


def _shards(*names: str) -> list[Shard]:
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    return [
        Shard(name=name, sequences=number + 1, bytes=10 * (number + 1), sha256=digest, index_sha256=digest[::-1])
        for number, (name, digest) in enumerate(zip(names, digests, strict=True))
    ]


def _load(split: Path) -> Manifest:
    return Manifest.load(split / "manifest.json")


def test_a_manifest_is_the_same_in_both_forms(split: Path, tmp_path: Path) -> None:
    with_table = _load(split)
    assert convert(split, to="list")[0].endswith(f"fingerprint {with_table.fingerprint[:12]}… as before")
    assert sorted(path.name for path in split.iterdir() if path.suffix != ".tar" and ".idx" not in path.name) == [
        "manifest.json",
        "tokenizer.model",
    ]
    text = (split / "manifest.json").read_text()
    as_list = _load(split)
    assert as_list.fingerprint == with_table.fingerprint == with_table.content_sha256()
    assert json.loads(text)["sha256"] == as_list.fingerprint, "as releases before tables wrote it"
    assert as_list.fingerprint == hashlib.sha256(as_list.model_dump_json().encode()).hexdigest()
    assert as_list.shards == with_table.shards
    assert list(as_list.shards) == list(with_table.shards)
    assert convert(split, to="list")[0].endswith("listed in manifest.json already")
    convert(tmp_path, to="table")
    convert(tmp_path, to="list")
    assert (split / "manifest.json").read_text() == text


def test_a_list_that_no_release_reads_is_not_written(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 400,000 shards; the conversion deletes the table."""
    before = _load(split).fingerprint
    monkeypatch.setattr(hashed_record, "MAX_RECORD_BYTES", (split / "manifest.json").stat().st_size)
    with pytest.raises(UserError, match=r"manifest\.json would have [0-9,]+ bytes, more than the [0-9,]+ that are"):
        convert(split, to="list")
    assert _load(split).content_sha256() == before


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["shard-00098.tar", "shard-00099.tar", "shard-00100.tar"], "shard-{:05d}.tar"),
        (["a-9.tar", "a-10.tar"], "a-{:01d}.tar"),
        (["7", "8"], "{:01d}"),
        (["shard-00000.tar", "shard-00002.tar"], None),
        (["b.tar", "a.tar"], None),
        (["a.tar"], None),
    ],
)
def test_names_follow_a_pattern_or_are_in_the_table(tmp_path: Path, names: list[str], pattern: str | None) -> None:
    shards = _shards(*names)
    table = ShardTable.of(shards)
    record = table.write(tmp_path)
    assert record.names == pattern
    rows = np.load(tmp_path / "shards.npy", mmap_mode="r")
    assert rows.dtype.itemsize == 80 + (0 if pattern else max(map(len, names)))
    assert rows["bytes"].tolist() == [shard.bytes for shard in shards]
    assert list(table) == shards
    assert table[-1] == shards[-1]
    assert table[1:] == tuple(shards[1:])
    is_listed = table.name_test()
    assert all(is_listed(name) and is_listed(f"{name}.idx.npy") for name in names)
    assert not any(map(is_listed, ["", "shard-00001.tar", "shard-000100.tar", "a-11.tar", "9", ".idx.npy", "c.tar"]))
    assert json.loads("".join(table.json_parts())) == [
        {name: getattr(shard, name) for name in ("name", "sequences", "bytes", "sha256", "index_sha256")}
        for shard in shards
    ]


def test_two_shards_of_one_name_are_refused() -> None:
    for names in (["a.tar", "a.tar"], ["a.tar", "b.tar", "a.tar"], ["a.tar", "a.tar.idx.npy"]):
        with pytest.raises(ValueError, match="two shards or indices have the same name"):
            ShardTable.of(_shards(*names))
    for text in ("shard-{:05d}.tar.idx.npy", "../{:05d}.tar", "{:05d}/a", "{!r}", "{:05d}{:05d}", "-{:02d}"):
        try:
            pattern = NamePattern.parse(text, 0)
        except ValueError:
            continue
        assert text.endswith(".npy"), "a name and its index differ in their ends"
        assert pattern.name(0) + ".idx.npy" != pattern.name(1)


def _write(split: Path, change: Callable[[bytes], bytes]) -> None:
    path = split / "shards.npy"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], r"expected \d+ bytes, the table of 3 shards, found \d+: restore it"),
        (lambda data: data + data, r"expected \d+ bytes, the table of 3 shards, found"),
        (lambda data: b"", r"cannot be read \(it is empty\): restore it"),
        (lambda data: data[:-5] + b"\0" + data[-4:], "was changed after it was written: expected sha256 [0-9a-f]{12}…"),
        (lambda data: bytes(len(data)), "was changed after it was written"),
    ],
)
def test_a_damaged_table_is_one_line(split: Path, change: Callable[[bytes], bytes], message: str) -> None:
    _write(split, change)
    _refused(split, message)


def _refused(split: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        _load(split)
    assert "\n" not in str(refused.value)
    assert str(split) in str(refused.value)


def test_a_missing_table_and_one_of_another_split_are_one_line(split: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_split(other, random_sequences(9, seed=1), per_shard=4)
    convert(other, to="table")
    shutil.copy(other / "shards.npy", split)
    _refused(split, "was changed after it was written")
    (split / "shards.npy").unlink()
    _refused(split, r"shards\.npy, the shard table of .*manifest\.json, cannot be read \(No such file or directory\)")
    (split / "shards.npy").symlink_to("/dev/zero")
    _refused(split, "cannot be read")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("sequences", 0, "shard 1: expected sequences from 1 to 4294967296, found 0"),
        ("sequences", -5, "shard 1: expected sequences from 1 to 4294967296, found -5"),
        ("bytes", 1 << 51, "shard 1: expected bytes from 1 to 1125899906842624, found"),
        ("header", None, "expected an .npy of 3 records, found"),
        ("name", b"../b.tar", "shard 1: b'../b.tar' is no name of a file"),
        ("name", b"a\0b", r"shard 1: b'a\\x00b' is no name of a file"),
        ("name", b".hidden", "is no name of a file"),
        ("name", b"", "is no name of a file"),
        ("name", b"alpha.tar", "two shards or indices have the same name"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_though_the_hash_is_right(
    tmp_path: Path, column: str, value: int | bytes | None, message: str
) -> None:
    """A table that somebody made by hand, with a manifest that records it."""
    names = ["alpha.tar", "beta.tar", "gamma.tar"] if column == "name" else ["a0.tar", "a1.tar", "a2.tar"]
    record = ShardTable.of(_shards(*names)).write(tmp_path)
    path = tmp_path / "shards.npy"
    rows = np.load(path)
    if column == "header":
        path.write_bytes(path.read_bytes().replace(b"sequences", b"SEQUENCES"))
    else:
        rows[column][1] = value
        np.save(path, rows)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    stored = TableRecord(**{**record.model_dump(), "sha256": sha256})
    with pytest.raises(UserError, match=message) as refused:
        ShardTable.read(LocalFolder(tmp_path), stored, "manifest.json")
    assert "\n" not in str(refused.value)


def test_edits_of_a_manifest_with_a_table_are_seen(split: Path) -> None:
    text = (split / "manifest.json").read_text()
    for before, after in {
        '"count": 3': '"count": 2',
        "shard-{:05d}": "shard-{:06d}",
        '"first": 0': '"first": 1',
        '"content_sha256": "': '"content_sha256": "0',
        '"file": "shards.npy"': '"file": "../shards.npy"',
    }.items():
        (split / "manifest.json").write_text(text.replace(before, after))
        _refused(split, "was changed after it was written|content_sha256|file")


def test_a_remote_table_is_fetched_once_a_node(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    local = _load(split)
    with serving(split.parent) as server:
        url = f"{server.url}/train/manifest.json"
        for _ in range(3):
            manifest = Manifest.load(url)
            assert (manifest.fingerprint, manifest.shards) == (local.fingerprint, local.shards)
        ranges = [header for path, header in server.requests if path.endswith("shards.npy")]
        size = (split / "shards.npy").stat().st_size
        assert ranges == ["bytes=0-0", f"bytes=0-{size - 1}", "bytes=0-0", "bytes=0-0"]
        copy = next(path for path in (tmp_path / "node").rglob("*") if path.is_file() and path.suffix != ".lock")
        copy.write_bytes(bytes(size))
        assert Manifest.load(url).shards == local.shards, "a damaged copy is fetched again"
        _write(split, lambda data: data[:-1])
        with pytest.raises(UserError, match=r"expected \d+ bytes, the table of 3 shards, found"):
            Manifest.load(url)
        (split / "shards.npy").unlink()
        with pytest.raises(UserError, match=r"the shard table of .* cannot be read"):
            Manifest.load(url)


def test_a_run_that_began_on_a_list_resumes_on_a_table_and_back(split: Path) -> None:
    """Same order, same position, same bytes of tokens."""
    batches, cursors = [], []
    start = None
    for form in ("list", "table", "list"):
        convert(split, to="list" if form == "list" else "table")
        stream = TokenStream(_load(split), seed=3, batch_slots=4, rank=0, world_size=1, start=start)
        batch, start = next(iter(stream))
        batches.append(batch.tokens)
        cursors.append(start)
    whole = iter(TokenStream(_load(split), seed=3, batch_slots=4, rank=0, world_size=1))
    for tokens, cursor in zip(batches, cursors, strict=True):
        expected, position = next(whole)
        assert torch.equal(tokens, expected.tokens)
        assert cursor == position
