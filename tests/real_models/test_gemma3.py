"""Gemma 3 270M as a teacher: norms of another kind, sliding windows, 262,144 ids, and `<bos>` before every text."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_models import GEMMA, gemma_gguf
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.models.gguf import convert_gguf
from tests.real_models import teachers

TENSORS = {
    "blk.17.ffn_down.weight": "model.layers.17.mlp.down_proj.weight",
    "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
    "blk.5.attn_q_norm.weight": "model.layers.5.self_attn.q_norm.weight",
    "blk.11.post_ffw_norm.weight": "model.layers.11.post_feedforward_layernorm.weight",
    "output_norm.weight": "model.norm.weight",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teachers.require(GEMMA)
    return gemma_gguf(tmp_path_factory.mktemp("gemma3-gguf"))


@pytest.fixture(scope="module")
def teacher(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3") / "teacher-hf"
    convert_gguf(file, folder)
    return folder


@pytest.fixture(scope="module")
def model(teacher: Path) -> Any:
    return teachers.transformers_model(teacher)


@pytest.fixture(scope="module")
def manifest(teacher: Path) -> Path:
    return teachers.tokenized(teacher, teacher.parent / "data")


def test_the_folder_holds_the_tensors_of_the_file(file: Path, teacher: Path) -> None:
    """The file has 1 added to the norms' weights, which transformers adds when it computes."""
    teachers.assert_tensors_of_the_file(file, teacher, TENSORS, norm_offset=1.0)


def test_its_tokenizer_comes_along(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.vocab_size == 262_144
    text = "In 2024, π is 3.14159.\n\n    def f(x):\n        return x\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode(ids[place : place + 1]) for place in range(len(ids))]
    assert pieces[:6] == ["In", " ", "2", "0", "2", "4"]


@pytest.mark.parametrize("stages", [1, 2])
def test_its_stages_give_transformers_logits(stages: int, teacher: Path, model: Any) -> None:
    teachers.assert_stages_give_transformers_logits(teacher, model, stages)


def test_its_cross_entropy_is_transformers(teacher: Path, model: Any, manifest: Path) -> None:
    """Text, shards, `evaluate`: against the model and tokenizer of transformers alone."""
    expected = teachers.transformers_cross_entropy(teacher, model)
    assert expected < 2.0, "it has read the text before"
    assert teachers.measured(teacher, manifest)["cross_entropy"] == pytest.approx(expected, rel=0.02)


def test_without_bos_it_is_another_model(teacher: Path, manifest: Path) -> None:
    """The reason for `<bos>` at position 0 of every sequence."""
    without = teachers.tokenized(teacher, teacher.parent / "without", "--no-insert-bos")
    worse, usual = (teachers.measured(teacher, each)["cross_entropy"] for each in (without, manifest))
    assert worse > usual + 1.0


def test_a_student_learns_from_it_for_a_few_steps(teacher: Path, manifest: Path) -> None:
    teachers.assert_a_student_learns(teacher, manifest, teacher.parent, vocab_size=262_144)
