"""SmolLM2-135M as a teacher: its folder is what its file says, and by `recipes/smollm2.yaml` a student learns of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_models import SMOLLM2, smollm2_gguf
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.models.gguf import convert_gguf
from tests.real_models import teachers

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
    "output_norm.weight": "model.norm.weight",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teachers.require(SMOLLM2)
    folder = tmp_path_factory.mktemp("smollm2") / "teacher-hf"
    convert_gguf(smollm2_gguf(), folder)
    return folder


@pytest.fixture(scope="module")
def model(teacher: Path) -> Any:
    return teachers.transformers_model(teacher)


@pytest.fixture(scope="module")
def manifest(teacher: Path) -> Path:
    return teachers.tokenized(teacher, teacher.parent / "data")


def test_the_folder_holds_the_tensors_of_the_file(teacher: Path) -> None:
    teachers.assert_tensors_of_the_file(smollm2_gguf(), teacher, TENSORS)
    assert json.loads((teacher / "config.json").read_text())["num_hidden_layers"] == 30


def test_its_tokenizer_comes_along(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.vocab_size == 49_152
    text = "In 2024, π is 3.14159.\n\n    def f(x):\n        return x\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode(ids[place : place + 1]) for place in range(len(ids))]
    assert pieces[:6] == ["In", " ", "2", "0", "2", "4"], "SmolLM2 reads digit by digit"


@pytest.mark.parametrize("stages", [1, 2])
def test_its_stages_give_transformers_logits(stages: int, teacher: Path, model: Any) -> None:
    teachers.assert_stages_give_transformers_logits(teacher, model, stages)


def test_its_cross_entropy_is_transformers(teacher: Path, model: Any, manifest: Path) -> None:
    """Text, shards, `evaluate`: against the model and tokenizer of transformers alone."""
    expected = teachers.transformers_cross_entropy(teacher, model)
    assert expected < 3.5, "it has read the text before"
    assert teachers.measured(teacher, manifest)["cross_entropy"] == pytest.approx(expected, rel=0.02)


def test_a_student_learns_from_it_for_a_few_steps(teacher: Path, manifest: Path) -> None:
    teachers.assert_a_student_learns(teacher, manifest, teacher.parent, vocab_size=49_152)
