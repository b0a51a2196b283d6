"""What a shard or a manifest must not say, and where each fault is named."""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset import TarWriter

from megadistill.data import Manifest, ShardFault, TokenStream
from megadistill.data.shards import ShardReader, _index, token_dtype, write_shards
from megadistill.errors import OperatorFault, UserError
from tests.unit.data.conftest import SEQUENCE


@pytest.fixture
def split(data_set: Path, tmp_path: Path) -> Path:
    """A copy of the training split, to be broken."""
    return Path(shutil.copytree(data_set / "train", tmp_path / "train"))


def _manifest(split: Path) -> Manifest:
    return Manifest.load(split / "manifest.json")


def _edit(split: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = split / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _replace_first_unit(split: Path, data: bytes) -> None:
    """A shard whose size, index and crc32 are all in order, with a first unit that is not."""
    manifest = _manifest(split)
    shard = manifest.shards[0]
    reader = ShardReader(manifest, 0)
    units: list[Any] = [data, *(reader.unit(number) for number in range(1, shard.units))]
    with open(split / shard.name, "wb") as file, TarWriter(file, mtime=0) as tar:
        for number, unit in enumerate(units):
            tar.write({"__key__": f"{number:010d}", "tokens.npy": unit})
    _publish(split, _index(split / shard.name))


def _publish(split: Path, index: np.ndarray[Any, Any]) -> None:
    shard = _manifest(split).shards[0]
    np.save(split / shard.index, index)

    def agree(content: dict[str, Any]) -> None:
        content["shards"][0]["bytes"] = (split / shard.name).stat().st_size
        content["shards"][0]["index_sha256"] = _sha256(split / shard.index)

    _edit(split, agree)


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _refused(split: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as refused:
        _manifest(split)
    assert "\n" not in str(refused.value)
    assert "manifest.json" in str(refused.value)


def test_units_round_trip_with_their_dtype(tmp_path: Path) -> None:
    units = [np.arange(5, dtype=np.int32) + 65_530 + k for k in range(7)]
    shards = write_shards(tmp_path, units, vocab_size=70_000, units_per_shard=3)
    assert [shard.units for shard in shards] == [3, 3, 1]
    assert [(_sha256(tmp_path / s.name), (tmp_path / s.name).stat().st_size) for s in shards] == [
        (s.sha256, s.bytes) for s in shards
    ]
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


def test_what_the_manifest_says_is_on_the_disk(manifest: Manifest) -> None:
    assert len(manifest.shards) > 2
    for shard in manifest.shards:
        assert _sha256(manifest.folder / shard.name) == shard.sha256
        assert _sha256(manifest.folder / shard.index) == shard.index_sha256


def test_the_fingerprint_is_of_the_content_not_of_the_place(manifest: Manifest, split: Path) -> None:
    assert _manifest(split).fingerprint == manifest.fingerprint
    _edit(split, lambda content: content["source"].update(inputs=["other"]))
    assert _manifest(split).fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    "name", ["../shard-00000.tar", "/etc/passwd", "a/../../b", "sub/shard.tar", ".hidden", "", "a\\b"]
)
@pytest.mark.parametrize("field", ["name", "index"])
def test_a_name_that_leaves_the_folder_is_refused(split: Path, field: str, name: str) -> None:
    _edit(split, lambda content: content["shards"][0].update({field: name}))
    _refused(split, rf"shards\.0\.{field}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2; this release reads version 1"),
        (lambda m: m.update(vocab_size=10**12), "vocab_size"),
        (lambda m: m.update(vocab_size=70_000), "dtype uint16 does not go with vocab_size 70000"),
        (lambda m: m.update(sequence_length=0), "sequence_length"),
        (lambda m: m.update(sequence_length=10**15), "sequence_length"),
        (lambda m: m.update(sequence_length="64"), "sequence_length"),
        (lambda m: m.update(tokens=m["tokens"] + 1), "tokens is"),
        (lambda m: m.update(text_bytes=0), "text_bytes"),
        (lambda m: m.update(shards=[]), "shards"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"]), "same name"),
        (lambda m: m["shards"][0].update(units=-1), "units"),
        (lambda m: m["shards"][0].update(bytes=10**20), "bytes"),
        (lambda m: m["shards"][0].update(sha256="abc"), "sha256"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("dtype"), "dtype"),
        (lambda m: m["tokenizer"].update(file="../../tokenizer.model"), r"tokenizer\.file"),
        (lambda m: m["packer"].update(name="other"), r"packer\.name"),
    ],
)
def test_a_hand_edited_manifest_is_refused(split: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    _edit(split, change)
    _refused(split, message)


def test_no_manifest_bad_json_and_a_folder_are_refused(split: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Manifest.load(split)
    for junk in (b"{", b"[]", b"\xff\xfe", b""):
        (split / "manifest.json").write_bytes(junk)
        _refused(split, "not a valid manifest")
    (split / "manifest.json").unlink()
    _refused(split, "No such file")


def _read_all(split: Path) -> None:
    manifest = _manifest(split)
    TokenStream(manifest, seed=1, batch_slots=1, rank=0, world_size=1).batch(range(manifest.units))


def _faulty(split: Path, match: str) -> str:
    with pytest.raises(ShardFault, match=match) as fault:
        _read_all(split)
    assert isinstance(fault.value, OperatorFault)
    assert "\n" not in str(fault.value)
    assert str(fault.value).startswith("slot ")
    return str(fault.value)


def test_an_intact_copy_reads(split: Path) -> None:
    _read_all(split)


def test_a_flipped_byte_is_named_by_slot_shard_unit_and_offset(split: Path) -> None:
    manifest = _manifest(split)
    shard = manifest.shards[1]
    offset, length, _ = np.load(split / shard.index)[5].tolist()
    with open(split / shard.name, "r+b") as file:
        file.seek(offset + length - 1)
        last = file.read(1)[0]
        file.seek(offset + length - 1)
        file.write(bytes([last ^ 1]))
    message = _faulty(split, "expected crc32")
    assert f"shard 1: {split / shard.name} unit 5 at byte {offset}" in message


def test_a_truncated_empty_or_missing_tar(split: Path) -> None:
    path = split / _manifest(split).shards[0].name
    whole = path.read_bytes()
    for left in (whole[:-3000], b"", whole + b"\0"):
        path.write_bytes(left)
        _faulty(split, f"expected {len(whole)} bytes, found {len(left)}")
    path.unlink()
    _faulty(split, "No such file")


def test_swapped_shards_are_found(split: Path) -> None:
    first, second = (split / shard.name for shard in _manifest(split).shards[:2])
    assert first.stat().st_size == second.stat().st_size
    keep = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(keep)
    _faulty(split, "expected crc32")


def test_a_wrong_or_missing_index(split: Path) -> None:
    shard = _manifest(split).shards[0]
    rows = np.load(split / shard.index)
    np.save(split / shard.index, rows[::-1])
    _faulty(split, "expected the index with sha256")
    for bad, message in (
        (rows[:-1], "expected .* int64, found"),
        (rows.astype(np.int32), "int32"),
        (np.add(rows, [shard.bytes, 0, 0]), "byte ranges"),
        (rows * [1, -1, 1], "byte ranges"),
        (np.array([None, 1], dtype=object), "plain numbers"),
    ):
        _publish(split, bad)
        _faulty(split, message)
    (split / shard.index).unlink()
    _faulty(split, "No such file")


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_npy(np.full(SEQUENCE + 1, 600, dtype=np.uint16)), "expected ids below 600, found 600"),
        (_npy(np.zeros(SEQUENCE, dtype=np.uint16)), r"found \(64,\) uint16"),
        (_npy(np.zeros((SEQUENCE + 1, 1), dtype=np.uint16)), r"found \(65, 1\)"),
        (_npy(np.zeros(SEQUENCE + 1, dtype=np.int64)), "found .* int64"),
        (_npy(np.zeros(SEQUENCE + 1, dtype=np.uint16)) + b"more", "expected"),
        (_npy(np.zeros(SEQUENCE + 1, dtype=np.uint16))[:-1], "plain numbers"),
        (_npy(np.array([_Bomb()] * (SEQUENCE + 1), dtype=object)), "plain numbers"),
        (pickle.dumps(_Bomb()), "plain numbers"),
        (b"", "plain numbers"),
    ],
)
def test_a_unit_that_is_no_unit_though_its_crc_holds(split: Path, data: bytes, message: str) -> None:
    _replace_first_unit(split, data)
    assert "unit 0 at byte 512" in _faulty(split, message)
