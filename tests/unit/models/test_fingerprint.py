"""The fingerprint of a teacher: the same weights have one, others have another."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.errors import UserError
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.hf_folder import SINGLE_FILE
from tests.unit.models.cases import saved_model


def test_the_same_weights_in_other_files_are_the_same_teacher(tmp_path: Path) -> None:
    saved_model("llama", tmp_path / "one")
    saved_model("llama", tmp_path / "many", shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert teacher_fingerprint(tmp_path / "one") == teacher_fingerprint(tmp_path / "many")


def test_other_weights_of_the_same_shapes_are_another_teacher(tmp_path: Path) -> None:
    model = saved_model("llama-tied", tmp_path / "before")
    seen = {teacher_fingerprint(tmp_path / "before")}
    for name in ("model.norm.weight", "model.layers.3.mlp.up_proj.weight"):
        with torch.no_grad():
            model.get_parameter(name).add_(1e-3)
        model.save_pretrained(tmp_path / name)
        seen.add(teacher_fingerprint(tmp_path / name))
    assert len(seen) == 3


def test_another_config_is_another_teacher(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    before = teacher_fingerprint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert teacher_fingerprint(tmp_path) != before


def test_a_scalar_among_the_tensors_is_a_part_of_it(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    tensors, seen = load_file(tmp_path / SINGLE_FILE), set()
    for value in (1.0, 2.0):
        save_file({**tensors, "scale": torch.tensor(value)}, tmp_path / SINGLE_FILE)
        seen.add(teacher_fingerprint(tmp_path))
    assert len(seen) == 2


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json: name a Hugging Face model folder"):
        teacher_fingerprint(tmp_path)
