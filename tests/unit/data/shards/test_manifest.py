"""Values that a manifest must not have, and the one line that refuses each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadistill.data.shards.manifest import Manifest, token_dtype
from megadistill.errors import UserError
from tests.unit.data.splits import random_sequences, write_split

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "train"
    write_split(folder, random_sequences(9, seed=0), per_shard=4)
    return folder


@pytest.fixture
def split(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "train"))


def _load(split: Path) -> Manifest:
    return Manifest.load(split / "manifest.json")


def _edit(split: Path, change: Change) -> None:
    content = json.loads((split / "manifest.json").read_text())
    change(content)
    (split / "manifest.json").write_text(json.dumps(content))


def _refused(split: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as refused:
        _load(split)
    assert "\n" not in str(refused.value)
    assert str(split / "manifest.json") in str(refused.value)


def test_a_manifest_is_the_same_wherever_its_folder_lies(whole: Path, split: Path) -> None:
    assert _load(split).fingerprint == _load(whole).fingerprint
    assert _load(split).folder.location == str(split)


def test_every_edit_by_hand_is_seen(split: Path) -> None:
    text = (split / "manifest.json").read_text()
    edits: list[Change] = [
        lambda m: m["source"].update(inputs=["other"]),
        lambda m: m.update(tokens=m["tokens"] - 1),
        lambda m: m["shards"][0].update(sha256="0" * 64),
        lambda m: m["shards"].reverse(),
        lambda m: m["shards"].pop(),
        lambda m: m.pop("sha256"),
        lambda m: m.update(sha256="0" * 64),
        lambda m: m.update(sha256=None),
    ]
    for edit in edits:
        (split / "manifest.json").write_text(text)
        _edit(split, edit)
        _refused(split, r"was changed after it was written|tokens is|: sha256: ")


@pytest.mark.parametrize(
    "name", ["../shard-00000.tar", "/etc/passwd", "a/../../b", "sub/shard.tar", ".hidden", "", "a\\b", "a\n", "ü"]
)
def test_a_name_that_leaves_the_folder_is_refused(split: Path, name: str) -> None:
    _edit(split, lambda content: content["shards"][0].update(name=name))
    _refused(split, r"shards\.0\.name")


@pytest.mark.parametrize(
    "file", ["../../tokenizer.model", "/etc/passwd", "a/../../b", "a/.././b", "../.ssh/key", "a\n"]
)
def test_a_tokenizer_outside_of_the_data_set_is_refused(split: Path, file: str) -> None:
    _edit(split, lambda content: content["tokenizer"].update(file=file))
    _refused(split, r"tokenizer\.file")


TOKEN_FILES = {
    "kind": "token_file",
    "format": "megatron",
    "folder": "../",
    "dtype": "uint16",
    "has_documents": True,
    "segments": 1,
}


@pytest.mark.parametrize(
    "folder", ["..", "../..", "../../", "/etc", "a/../../b", "../a/../..", "../.ssh", ".", "", "a\n", "https://a/b"]
)
def test_token_files_outside_of_the_neighbouring_folders_are_refused(split: Path, folder: str) -> None:
    _edit(split, lambda content: content.update(sample_format={**TOKEN_FILES, "folder": folder}))
    _refused(split, r"sample_format\.token_file\.folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2; this release reads version 3"),
        (lambda m: m.pop("version"), "format version None"),
        (lambda m: m.update(vocab_size=10**12), "vocab_size"),
        (lambda m: m.update(vocab_size=70_000), "dtype uint16 does not go with vocab_size 70000"),
        (lambda m: m.update(sequence_length=0), "sequence_length"),
        (lambda m: m.update(sequence_length=10**15), "sequence_length"),
        (lambda m: m.update(sequence_length="24"), "sequence_length"),
        (lambda m: m.update(tokens=9 * 24 + 1), "tokens is 217, but 9 sequences of 24 make 216 at most"),
        (lambda m: m.update(text_bytes=0), "text_bytes"),
        (lambda m: m.update(shards=[]), "shards"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"]), "same name"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"] + ".idx.npy"), "same name"),
        (lambda m: m["shards"][0].update(sequences=-1), "sequences"),
        (lambda m: m["shards"][0].update(bytes=10**20), "bytes"),
        (lambda m: m["shards"][0].update(sha256="abc"), "sha256"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("dtype"), "dtype"),
        (lambda m: m["packer"].update(name="other"), r"packer\.name"),
        (lambda m: m["sample_format"].update(kind="pickle"), "sample_format: Input tag 'pickle'"),
        (lambda m: m["sample_format"].update(tokens="../x"), r"sample_format\.npy\.tokens"),
        (lambda m: m.update(sample_format={**TOKEN_FILES, "dtype": "float32"}), r"sample_format\.token_file\.dtype"),
        (lambda m: m.update(sample_format={**TOKEN_FILES, "format": "pickle"}), r"sample_format\.token_file\.format"),
        (lambda m: m.update(sample_format={**TOKEN_FILES, "segments": 0}), r"sample_format\.token_file\.segments"),
        (lambda m: m.update(sample_format={**TOKEN_FILES, "dtype": "int32"}), "dtype uint16 does not go with ids"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(split: Path, change: Change, message: str) -> None:
    _edit(split, change)
    _refused(split, message)


def test_no_manifest_bad_json_and_a_folder_are_refused(split: Path) -> None:
    path = split / "manifest.json"
    for junk in (b"{", b"[]", b"3", b"\xff\xfe", b"", b"[" * 100_000):
        path.write_bytes(junk)
        _refused(split, "is not a valid manifest")
    path.unlink()
    _refused(split, rf"train/manifest\.json does not exist \(paths are relative to {Path.cwd()}\): give the manifest")
    path.mkdir()
    _refused(split, "cannot be read .it is a folder")


def test_a_finished_split_is_not_written_into(split: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json exists"):
        Manifest.refuse_finished(split)
    Manifest.refuse_finished(tmp_path)
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")
