"""Folders of safetensors: one file or many, by tensor and by rows; what is broken is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megadistill.errors import UserError
from megadistill.models.hf_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder

TENSORS = {
    "a.weight": torch.arange(20.0).reshape(10, 2),
    "b.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
}


def _single(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE_FILE)


def _sharded(folder: Path) -> None:
    files = {name: f"model-{place}.safetensors" for place, name in enumerate(TENSORS)}
    for name, file in files.items():
        save_file({name: TENSORS[name]}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("write", [_single, _sharded])
def test_names_shapes_dtypes_tensors_and_rows(write: object, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path)
    folder = SafetensorsFolder(tmp_path)
    assert folder.names == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert (folder.shape(name), folder.dtype(name)) == (tensor.shape, tensor.dtype)
        assert torch.equal(next(folder.tensors([name])), tensor)
    rows = folder.rows("a.weight", [(1, 3), (3, 3), (8, 10)])
    assert torch.equal(rows, TENSORS["a.weight"][[1, 2, 8, 9]])
    assert folder.rows("a.weight", []).shape == (0, 2)
    with pytest.raises(AssertionError, match="has 10 rows"):
        folder.rows("a.weight", [(8, 11)])
    with pytest.raises(UserError, match=r"no tensor 'a\.weigt'; did you mean 'a\.weight'"):
        next(folder.tensors(["a.weigt"]))


def test_a_file_is_opened_only_when_one_of_its_tensors_is_read(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    folder = SafetensorsFolder(tmp_path)
    assert torch.equal(next(folder.tensors(["a.weight"])), TENSORS["a.weight"])
    with pytest.raises(UserError, match=r"model-1\.safetensors does not exist"):
        next(folder.tensors(["b.weight"]))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has neither"),
        ({"pytorch_model.bin": b""}, "pickled weights only"),
        ({"pytorch_model-00001-of-00002.bin": b""}, "pickled weights only"),
        ({SINGLE_FILE: b"not safetensors at all"}, "not a readable safetensors file"),
        ({INDEX_FILE: b"{"}, "not a safetensors index"),
        ({INDEX_FILE: b"[]"}, "not a safetensors index"),
        ({INDEX_FILE: b"{}"}, "not a safetensors index"),
        ({INDEX_FILE: b'{"weight_map": []}'}, "not a safetensors index"),
        ({INDEX_FILE: b'{"weight_map": {"a": 1}}'}, "not a safetensors index"),
        ({INDEX_FILE: b'{"weight_map": {"a": "../outside.safetensors"}}'}, "not a safetensors file of its own folder"),
        ({INDEX_FILE: b'{"weight_map": {"a": "/etc/passwd"}}'}, "not a safetensors file of its own folder"),
        ({INDEX_FILE: b'{"weight_map": {"a": "pytorch_model.bin"}}'}, "not a safetensors file of its own folder"),
        ({INDEX_FILE: b'{"weight_map": {"a": ".."}}'}, "not a safetensors file of its own folder"),
    ],
)
def test_a_broken_folder_is_refused(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        SafetensorsFolder(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_that_promises_too_much_and_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(UserError, match="does not hold 'b'"):
        next(folder.tensors(["b"]))
    with pytest.raises(UserError, match="stored as I8: quantised"):
        next(folder.tensors(["a"]))
    with pytest.raises(UserError, match="stored as I8: quantised"):
        folder.rows("a", [(0, 1)])
