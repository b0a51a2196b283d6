"""Checkpoints in a world of one: complete or invisible, refused by name, and the same whoever cut them into pieces.

Several ranks that write together are in tests/ranks/test_student.py.
"""

import hashlib
import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megadistill.errors import OperatorFault, RestartFault
from megadistill.train.checkpoint import (
    FORMAT,
    RNG_KEY,
    Checkpoint,
    checkpoint_folders,
    newest_checkpoint,
    save_checkpoint,
)
from tests.unit.train.cases import topology

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


def _save(folder: Path, step: int, state: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "tokens": 64 * step,
        "vocab_size": 5,
        "cursor": {"fingerprint": "f", "next_slot": 8 * step},
        "parameters": {"w": (6, 2), "b": (3,)},
        "versions": {"torch": "some"},
        "topology": topology(),
    }
    return save_checkpoint(folder, _state() if state is None else state, step=step, **(options | changes))


def _newest(folder: Path) -> Checkpoint:
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def _refused(folder: Path) -> str:
    """What the newest checkpoint below `folder` is refused with."""
    with pytest.raises(OperatorFault) as caught:
        _newest(folder).verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _edit_manifest(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert _save(tmp_path, 9).name == "step-00000009"
    _save(tmp_path, 10, _state(scale=3.0))
    found = _newest(tmp_path)
    found.verify()
    assert (found.manifest.step, found.manifest.tokens, found.manifest.vocab_size) == (10, 640, 5)
    assert found.manifest.cursor == {"fingerprint": "f", "next_slot": 80}
    assert torch.equal(found.parameter("w"), 3 * WEIGHT)
    assert torch.equal(found.parameter("b"), 3 * BIAS)
    assert found.read("exp_avg/w", 3, 7).tolist() == [-3.0, -4.0, -5.0, -6.0]
    assert found.read("optimizer_step", 0, 1).tolist() == [7.0]
    assert torch.equal(_not_none(found.rng_state(0, 1)), torch.get_rng_state())
    assert found.rng_state(0, 2) is None, "the generators of another world are not this one's"


def _not_none(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def test_an_unfinished_checkpoint_is_invisible(tmp_path: Path) -> None:
    complete = _save(tmp_path, 4)
    (tmp_path / ".tmp-step-00000006").mkdir()
    for name in ("manifest.json", FILE):
        (tmp_path / ".tmp-step-00000006" / name).write_bytes((complete / name).read_bytes())
    assert _newest(tmp_path).folder == complete
    shutil.rmtree(complete)
    assert newest_checkpoint(tmp_path) is None


def test_what_a_killed_save_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000004").mkdir(parents=True)
    (tmp_path / ".tmp-step-00000004" / "half").write_bytes(b"half")
    assert sorted(path.name for path in _save(tmp_path, 4).iterdir()) == ["manifest.json", FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


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
        ({"world": 2}, "lists 1 files, 2 ranks wrote it"),
        ({"files": {}}, "lists 0 files, 1 ranks wrote it"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "lists 1 files"),  # only the ranks' own are opened
        ({"step": -1}, "no checkpoint manifest"),
        ({"another": 1}, "no checkpoint manifest"),
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


@contextmanager
def _full_disk(free: int) -> Iterator[None]:
    """No file of this process may grow past `free` bytes: the system's own error, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_restart_fault_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    large = {**_state(), "exp_avg_sq/w": torch.zeros(100_000)}
    with _full_disk(100_000), pytest.raises(RestartFault, match="checkpoint of step 4 was not written: rank 0: "):
        _save(tmp_path, 4, large)
    older = _newest(tmp_path)
    older.verify()
    assert older.manifest.step == 2
    _save(tmp_path, 4, large)
    assert _newest(tmp_path).manifest.step == 4, "the next attempt is not in the way of the first"


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


def _write_by_hand(folder: Path, pieces: list[int]) -> Tensor:
    """A checkpoint as the format describes it, cut into `pieces`; the whole tensor."""
    whole = torch.randn(sum(pieces))
    files = {}
    for rank, piece in enumerate(torch.split(whole, pieces)):
        path = folder / f"rank-{rank:05d}-of-{len(pieces):05d}.safetensors"
        save_file({"master/w": piece.clone()}, path)
        content = path.read_bytes()
        files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {
        "format": 1,
        "step": 3,
        "tokens": 30,
        "world": len(pieces),
        "vocab_size": 5,
        "cursor": {},
        "parameters": {"w": [len(whole)]},
        "versions": {},
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return whole


@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_every_range_is_that_of_the_whole(pieces: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = _write_by_hand(Path(name), pieces)
        found = Checkpoint(Path(name))
        found.verify()
        assert torch.equal(found.parameter("w"), whole)
        for start in range(len(whole) + 1):
            for stop in range(start, len(whole) + 1):
                assert torch.equal(found.read("master/w", start, stop), whole[start:stop]), (start, stop)


def test_what_is_in_the_way_is_a_fault_that_a_restart_can_mend(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    (tmp_path / ".tmp-step-00000004").write_bytes(b"in the way")
    with pytest.raises(RestartFault, match="step 4 was not written"):
        _save(tmp_path, 4)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RestartFault, match="step 6 was not written"):
        _save(tmp_path / "file", 6)
    assert _newest(tmp_path).manifest.step == 2


def test_a_disk_that_fills_up_at_the_manifest_is_a_fault_too(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    with _full_disk(100_000), pytest.raises(RestartFault, match="step 4 was not written"):
        _save(tmp_path, 4, versions={"x": "y" * 200_000})
    assert _newest(tmp_path).manifest.step == 2


def test_a_checkpoint_that_was_renamed_aside_is_out_of_the_way(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    _save(tmp_path, 4).rename(tmp_path / "step-00000004.damaged")
    assert _newest(tmp_path).manifest.step == 2
    assert list(checkpoint_folders(tmp_path)) == [2]


def test_a_newer_format_is_named_before_its_new_keys(tmp_path: Path) -> None:
    _edit_manifest(_save(tmp_path, 4), format=2, something_new=1)
    with pytest.raises(OperatorFault, match="format 2, this version reads 1"):
        _newest(tmp_path)


def test_a_named_checkpoint_without_its_manifest_is_damage(tmp_path: Path) -> None:
    """The manifest is there before the name, so it was lost since: going on from an older one would be silent."""
    _save(tmp_path, 2)
    (_save(tmp_path, 4) / "manifest.json").unlink()
    with pytest.raises(OperatorFault, match=r"step-00000004.*move .* away"):
        _newest(tmp_path)
