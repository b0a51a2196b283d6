"""Checkpoints in a world of one: complete or invisible, refused by name, and the same whoever cut them into pieces.

Writing is tested in test_writer.py, selection in test_select.py, several ranks in
tests/ranks/train/test_checkpoint.py.
"""

import hashlib
import json
import os
import shutil
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megadistill.errors import OperatorFault
from megadistill.models.families import EMBEDDING, HEAD
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import (
    FORMAT,
    RNG_KEY,
    Checkpoint,
    commit,
    newest_checkpoint,
    range_of_rank,
    write_rank,
)
from tests.unit.train.cases import cursor_of, manifest_of, save_checkpoint

WEIGHT, BIAS = torch.arange(12, dtype=torch.float32).reshape(6, 2), torch.tensor([0.5, -0.5, 2.0])
FILE = "rank-00000-of-00001.safetensors"


def _state(scale: float = 1.0) -> dict[str, Tensor]:
    return {
        "optimizer_step": torch.tensor([7.0]),
        "master/w": scale * WEIGHT.flatten(),
        "exp_avg/w": -WEIGHT.flatten(),
        "master/b": scale * BIAS,
        RNG_KEY: torch.get_rng_state(),
    }


def _save(folder: Path, step: int, state: dict[str, Tensor] | None = None, **manifest: Any) -> Path:
    return save_checkpoint(folder, _state() if state is None else state, step, **manifest)


def _newest(folder: Path) -> Checkpoint:
    newest = newest_checkpoint(folder)
    assert newest is not None
    return newest


def _refused(folder: Path) -> str:
    """The message that refuses the newest checkpoint below `folder`."""
    with pytest.raises(OperatorFault) as caught:
        _newest(folder).verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _edit_manifest(checkpoint: Path, *, signed: bool = True, **changes: Any) -> None:
    """`signed`: with the sha256 of the new values, so that nothing but they is wrong."""
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    if signed:
        del values["sha256"]
        values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values), encoding="utf-8")


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert _save(tmp_path, 9).name == "step-00000009"
    _save(tmp_path, 10, _state(scale=3.0))
    checkpoint = _newest(tmp_path)
    checkpoint.verify()
    assert (checkpoint.manifest.step, checkpoint.manifest.tokens, checkpoint.manifest.vocab_size) == (10, 640, 5)
    assert checkpoint.manifest.cursor == cursor_of(80)
    assert torch.equal(checkpoint.parameter("w"), 3 * WEIGHT)
    assert torch.equal(checkpoint.parameter("b"), 3 * BIAS)
    assert checkpoint.read("exp_avg/w", 3, 7).tolist() == [-3.0, -4.0, -5.0, -6.0]
    assert checkpoint.read("optimizer_step", 0, 1).tolist() == [7.0]
    assert torch.equal(_not_none(checkpoint.rng_state(0, 1)), torch.get_rng_state())
    assert checkpoint.rng_state(0, 2) is None, "the generators of another world are not this one's"


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_another_padding_of_the_vocabulary_is_read(tmp_path: Path, name: str, writers: int) -> None:
    """5 ids on 6 rows of 2 there; a reader has 5, 6, 8 or 12 rows, in any number of pieces."""
    beside = tmp_path / "beside"
    beside.mkdir()
    for rank in range(writers):
        start, stop = range_of_rank(12, rank, writers)
        pieces = {f"{kind}/{name}": sign * WEIGHT.flatten()[start:stop] for kind, sign in (("master", 1), ("exp", -1))}
        write_rank(beside, pieces, rank=rank, world=writers)
    commit(beside, tmp_path / "step-00000004", manifest_of(4, world=writers, parameters={name: (6, 2)}))
    checkpoint = Checkpoint(tmp_path / "step-00000004")
    for rows in (5, 6, 8, 12):
        expected = torch.cat([WEIGHT, torch.zeros(6, 2)])[:rows].flatten()
        for readers in (1, 2, 3, 4, 5, 6):
            ranges = [range_of_rank(2 * rows, rank, readers) for rank in range(readers)]
            for kind, sign in (("master", 1), ("exp", -1)):
                read = torch.cat([checkpoint.read(f"{kind}/{name}", start, stop) for start, stop in ranges])
                assert torch.equal(read, sign * expected), (rows, readers)
    assert torch.equal(checkpoint.parameter(name), WEIGHT), "an export reads what was written"


def test_no_other_parameter_may_be_longer_than_it_was_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint(_save(tmp_path, 4))
    with pytest.raises(OperatorFault, match="master/w has 12 elements, not 10 to 14"):
        checkpoint.read("master/w", 10, 14)


def _not_none(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def test_an_incomplete_checkpoint_is_invisible(tmp_path: Path) -> None:
    complete = _save(tmp_path, 4)
    for hidden in (".tmp-step-00000006-a1", ".removed-step-00000006", ".corrupt-a1-step-00000006"):
        shutil.copytree(complete, tmp_path / hidden)
    assert _newest(tmp_path).folder == complete
    shutil.rmtree(complete)
    assert newest_checkpoint(tmp_path) is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (_save(tmp_path, 4) / FILE).unlink()
    message = _refused(tmp_path)
    assert FILE in message
    assert "missing" in message


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_changed_file_is_named(tmp_path: Path, damage: Any) -> None:
    path = _save(tmp_path, 4) / FILE
    path.write_bytes(damage(path.read_bytes()))
    message = _refused(tmp_path)
    assert f"{path} is damaged" in message
    assert str(path.stat().st_size) in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": FORMAT + 1}, f"format {FORMAT + 1}, this version reads {FORMAT}"),
        ({"world": 2}, "lists 1 files, but 2 ranks wrote it"),
        ({"files": {}}, "lists 0 files, but 1 ranks wrote it"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "lists 1 files"),  # only the ranks' own are opened
        ({"step": -1}, "not a checkpoint manifest"),
        ({"another": 1}, "not a checkpoint manifest"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    _save(tmp_path, 2)
    _edit_manifest(_save(tmp_path, 4), **changes)
    message = _refused(tmp_path)
    assert says in message
    assert "step-00000004" in message, "not the older one in its place"


@pytest.mark.parametrize(("key", "start", "stop"), [("master/none", 0, 1), ("master/b", 0, 4), ("master/b", 3, 4)])
def test_what_is_not_there_is_refused(tmp_path: Path, key: str, start: int, stop: int) -> None:
    _save(tmp_path, 4)
    with pytest.raises(OperatorFault, match=key):
        _newest(tmp_path).read(key, start, stop)


TAMPERED: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("tampered_manifests.yaml").read_text())


@pytest.mark.parametrize("signed", [True, False], ids=["with a new hash", "with the old hash"])
@pytest.mark.parametrize("row", TAMPERED, ids=lambda row: row["name"])
def test_a_tampered_manifest_is_refused_in_little_memory(row: dict[str, Any], signed: bool, tmp_path: Path) -> None:
    path = _save(tmp_path, 4)
    values = json.loads((path / "manifest.json").read_text())
    changes = {key: values[key] | value if key == "cursor" else value for key, value in row["values"].items()}
    _edit_manifest(path, signed=signed, **changes)
    tracemalloc.start()
    try:
        message = _refused(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "step-00000004" in message
    assert len(message) < 500


@pytest.mark.parametrize("without", ["sha256", "format", "cursor", "files"])
def test_a_manifest_without_a_key_is_refused(without: str, tmp_path: Path) -> None:
    path = _save(tmp_path, 4) / "manifest.json"
    values = json.loads(path.read_text())
    del values[without]
    path.write_text(json.dumps(values))
    assert "manifest.json" in _refused(tmp_path)


def test_a_folder_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 4).rename(tmp_path / "step-00000008")
    assert "is of step 4, not of the folder's step 8" in _refused(tmp_path)
    (tmp_path / "step-00000008").rename(tmp_path / "the best one")
    Checkpoint(tmp_path / "the best one").verify()


@pytest.mark.parametrize("name", ["step-4", "step-000000004", "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661"])
def test_a_folder_of_a_name_that_no_run_gives_is_none_of_its_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / f"step-{'9' * 30}").mkdir()
    assert checkpoint_folders(tmp_path) == {}


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    """Everything is read by the library of its format alone, and nothing has another format."""
    files = [path for path in _save(tmp_path, 4).rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".safetensors"]
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, framework="pt") as file:
                assert set(file.keys()) == set(_state())


def _write_by_hand(folder: Path, numel: int, world: int) -> Tensor:
    """A checkpoint as the format describes it, of ranks with ceil(numel / world) elements each; the whole tensor."""
    whole, files, size = torch.randn(numel), {}, -(-numel // world)
    for rank in range(world):
        path = folder / f"rank-{rank:05d}-of-{world:05d}.safetensors"
        save_file({"master/w": whole[rank * size : (rank + 1) * size].clone()}, path)
        content = path.read_bytes()
        files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": 3,
        "tokens": 30,
        "world": world,
        "vocab_size": 5,
        "cursor": cursor_of(6),
        "parameters": {"w": [len(whole)]},
        "versions": {},
        "files": files,
    }
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return whole


@settings(max_examples=30)
@given(numel=st.integers(0, 12), world=st.integers(1, 7))
def test_every_range_is_that_of_the_whole(numel: int, world: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = _write_by_hand(Path(name), numel, world)
        checkpoint = Checkpoint(Path(name))
        checkpoint.verify()
        assert torch.equal(checkpoint.parameter("w"), whole)
        for start in range(len(whole) + 1):
            for stop in range(start, len(whole) + 1):
                assert torch.equal(checkpoint.read("master/w", start, stop), whole[start:stop]), (start, stop)


def test_a_piece_of_another_length_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    """Elements would come from the wrong place: where they lie follows from the manifest alone."""
    _write_by_hand(tmp_path, 6, 3)
    save_file({"master/w": torch.zeros(3)}, tmp_path / "rank-00001-of-00003.safetensors")
    with pytest.raises(OperatorFault, match=r"rank-00001-of-00003.* has the shape \[3\], its manifest says \[2\]"):
        Checkpoint(tmp_path).read("master/w", 2, 4)
    for key, stop in (("master/v", 1), ("master/w", 7), ("exp_avg/w", 6)):
        with pytest.raises(OperatorFault, match=key):
            Checkpoint(tmp_path).read(key, 0, stop)


def test_a_checkpoint_under_another_name_is_ignored(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    _save(tmp_path, 4).rename(tmp_path / "step-00000004.damaged")
    assert _newest(tmp_path).manifest.step == 2
    assert list(checkpoint_folders(tmp_path)) == [2]


def test_a_newer_format_is_named_before_its_new_keys(tmp_path: Path) -> None:
    _edit_manifest(_save(tmp_path, 4), format=FORMAT + 1, something_new=1)
    with pytest.raises(OperatorFault, match=f"format {FORMAT + 1}, this version reads"):
        _newest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000],
    ids=["none", "half", "list", "null", "bytes", "deep"],
)
def test_what_is_no_manifest_is_damage(tmp_path: Path, content: bytes) -> None:
    (_save(tmp_path, 4) / "manifest.json").write_bytes(content)
    assert "not a checkpoint manifest" in _refused(tmp_path)


def test_a_manifest_whose_values_changed_is_damage(tmp_path: Path) -> None:
    """A flipped digit of the cursor is as bad as one of the weights, and no file's hash covers it."""
    _edit_manifest(_save(tmp_path, 4), signed=False, cursor=cursor_of(33))
    assert "manifest.json is damaged" in _refused(tmp_path)
    _edit_manifest(_newest_folder(tmp_path), signed=True, cursor=cursor_of(32))
    _newest(tmp_path).verify()


def _newest_folder(folder: Path) -> Path:
    return checkpoint_folders(folder)[max(checkpoint_folders(folder))]


def test_a_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    with open(_save(tmp_path, 4) / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    assert "larger than 67.1 MB" in _refused(tmp_path)


def test_a_named_checkpoint_without_its_manifest_is_damage(tmp_path: Path) -> None:
    """The manifest is there before the name, so it was lost since: going on from an older one would be silent."""
    _save(tmp_path, 2)
    (_save(tmp_path, 4) / "manifest.json").unlink()
    assert "step-00000004" in _refused(tmp_path)


def test_of_several_readers_each_file_has_one(tmp_path: Path) -> None:
    """Three files, two readers: damage is found by one of them, whichever file it is."""
    _write_by_hand(tmp_path, 6, 3)
    for damaged in range(3):
        path = tmp_path / f"rank-{damaged:05d}-of-00003.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        damages = [_damage(Checkpoint(tmp_path), part, 2) for part in range(2)]
        assert sum(path.name in damage for damage in damages) == 1
        assert sorted(damages)[0] == ""
        path.write_bytes(content)
    assert [_damage(Checkpoint(tmp_path), part, 5) for part in range(5)] == [""] * 5


def _damage(checkpoint: Checkpoint, part: int, parts: int) -> str:
    try:
        checkpoint.verify(part, parts)
    except OperatorFault as fault:
        return str(fault)
    return ""


def test_a_checkpoint_never_replaces_another(tmp_path: Path) -> None:
    before = _save(tmp_path, 4)
    content = {path.name: path.read_bytes() for path in before.iterdir()}
    temporary = tmp_path / ".tmp-step-00000004-a2"
    temporary.mkdir()
    write_rank(temporary, _state(scale=2.0), rank=0, world=1)
    with pytest.raises(OSError, match="step-00000004"):
        commit(temporary, before, manifest_of(4))
    assert {path.name: path.read_bytes() for path in before.iterdir()} == content


def test_what_is_written_can_be_read_by_others(tmp_path: Path) -> None:
    """Whoever reads a run folder of a shared disk is not who wrote it."""
    assert {path.stat().st_mode & 0o777 for path in _save(tmp_path, 4).iterdir()} == {0o644}


def test_every_byte_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """System calls in order: files, the manifest, their folder; the rename; the folder of the new name."""
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    _save(tmp_path / "checkpoints", 4)
    temporary = ".tmp-step-00000004-a1"
    record, manifest = (f".{name}.tmp" for name in (f"{FILE}.json", "manifest.json"))
    assert done == [FILE, record, temporary, manifest, temporary, temporary, "rename", "checkpoints"]
