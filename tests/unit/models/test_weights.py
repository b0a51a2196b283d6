"""A model's weights in a folder: what is missing, cut short or of another shape is found from the headers alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.hf_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from megadistill.models.weights import check_weights, load_pretrained, stored_shapes
from tests.unit.models.cases import CASES, VOCAB, saved_model


def _check(folder: Path) -> None:
    check_weights(folder, load_config(folder, what="test"))


@pytest.mark.parametrize("size", ["5GB", "30KB"], ids=["one file", "many files"])
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_is_what_is_expected(case: str, size: str, tmp_path: Path) -> None:
    saved_model(case, tmp_path, shard_size=size)
    stored = SafetensorsFolder(tmp_path)
    assert {name: stored.shape(name) for name in stored.names} == stored_shapes(load_config(tmp_path, what="test"))
    _check(tmp_path)


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model("mixtral", tmp_path)
    monkeypatch.delattr(SafetensorsFolder, "tensors")
    monkeypatch.delattr(SafetensorsFolder, "rows")
    _check(tmp_path)


def _shard_of(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / INDEX_FILE).read_text())["weight_map"][name])


NAME = "model.layers.4.mlp.experts.5.up_proj.weight"


def _missing(folder: Path) -> None:
    _shard_of(folder, NAME).unlink()


def _cut_short(folder: Path) -> None:
    path = _shard_of(folder, NAME)
    os.truncate(path, path.stat().st_size - 1)


def _cut_in_the_header(folder: Path) -> None:
    os.truncate(_shard_of(folder, NAME), 20)


def _emptied(folder: Path) -> None:
    os.truncate(_shard_of(folder, NAME), 0)


def _longer(folder: Path) -> None:
    path = _shard_of(folder, NAME)
    os.truncate(path, path.stat().st_size + 1)


def _change(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = _shard_of(folder, NAME)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _wrong_shape(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({NAME: torch.zeros(41, 64)}))


def _turned(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}))


def _left_out(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.pop(NAME))


def _quantised(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.float8_e4m3fn)}))


def _not_in_the_index(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"][NAME]
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing, "does not exist, but .*index.json names it: the download is not complete"),
        (_cut_short, "not a readable safetensors file, or not a whole one"),
        (_cut_in_the_header, "not a readable safetensors file, or not a whole one"),
        (_emptied, "not a readable safetensors file, or not a whole one"),
        (_longer, "not a readable safetensors file, or not a whole one"),
        (_wrong_shape, r"up_proj.weight in .* is \[41, 64\], but its config.json says \[40, 64\]"),
        (_turned, r"up_proj.weight in .* is \[64, 40\], but its config.json says \[40, 64\]"),
        (_left_out, "does not hold 'model.layers.4.mlp.experts.5.up_proj.weight', which .*index.json promises"),
        (_quantised, "stored as F8_E4M3: quantised weights are read only with their scales"),
        (_not_in_the_index, "has no tensor 'model.layers.4.mlp.experts.5.up_proj.weight'; did you mean"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    saved_model("qwen3_moe", tmp_path, shard_size="30KB")
    _check(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        _check(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        load_pretrained(tmp_path, what="test", device=torch.device("cpu"))


def test_a_single_file_cut_short_is_refused(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    path = tmp_path / SINGLE_FILE
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="not a readable safetensors file, or not a whole one"):
        _check(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    saved_model("llama", tmp_path / "one")
    saved_model("qwen3", tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "config.json", tmp_path / "one" / "config.json")
    with pytest.raises(UserError, match=r"q_proj.weight in .* is \[64, 64\], but its config.json says \[96, 64\]"):
        _check(tmp_path / "one")


@pytest.mark.parametrize("case", ["gemma2", "mixtral"])
def test_a_whole_model_is_transformers_own(case: str, tmp_path: Path) -> None:
    model = saved_model(case, tmp_path)
    loaded = load_pretrained(tmp_path, what="test", device=torch.device("cpu"))
    tokens = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("named", "stored", "expected"),
    [
        (None, torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
        ("float16", torch.float16, torch.float16),
    ],
)
def test_a_whole_model_has_the_type_that_transformers_gives_it(
    named: str | None, stored: torch.dtype, expected: torch.dtype, tmp_path: Path
) -> None:
    saved_model("qwen2", tmp_path)
    path = tmp_path / SINGLE_FILE
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    keys = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "dtype": named}))
    loaded = load_pretrained(tmp_path, what="test", device=torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {theirs.dtype} == {expected}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
