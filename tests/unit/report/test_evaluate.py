"""Evaluation against transformers' own logits, densely and in float64; and what a person sees of it.

Legend: U units, S tokens of a sequence, V true vocabulary, P rows of a model that has padding.
"""

import io
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.data.packing import Unit
from megadistill.errors import OperatorFault, UserError
from megadistill.model.families import load_config
from megadistill.report.evaluate import Evaluation, _short_names, evaluate, table, write_json
from tests.unit.data.splits import random_units, write_split

UNITS, SEQUENCE, VOCAB, TEXT_BYTES = 7, 16, 250, 401

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
STUDENT, TEACHER = {**MODEL, "tie_word_embeddings": True}, {**MODEL, "hidden_size": 48, "vocab_size": VOCAB + 6}


def _saved(folder: Path, config: dict[str, Any], seed: int) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(load_config(config, what="test")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def units() -> Tensor:
    """[U, S + 1]"""
    return torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, (UNITS, SEQUENCE + 1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, units: Tensor) -> Path:
    """heldout/, a student with tied embeddings, and a teacher with six padding rows."""
    folder = tmp_path_factory.mktemp("report")
    whole = np.array([0, SEQUENCE + 1], dtype=np.int32)
    rows = [Unit(unit.astype(np.int32), whole) for unit in units.numpy()]
    write_split(folder / "heldout", rows, vocab=VOCAB, per_shard=4, text_bytes=TEXT_BYTES)
    _saved(folder / "student", STUDENT, seed=1)
    _saved(folder / "teacher", TEACHER, seed=2)
    return folder


def _logits(folder: Path, units: Tensor) -> Tensor:
    """[U·S, V] float64, without the padding rows."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: Tensor = model(input_ids=units[:, :-1]).logits
    return logits[..., :VOCAB].flatten(0, 1).double()


def _evaluate(place: Path, *models: str, teacher: bool = True, batch: int = 3) -> list[Evaluation]:
    return evaluate(
        [place / model for model in models],
        place / "heldout" / "manifest.json",
        teacher=place / "teacher" if teacher else None,
        batch=batch,
    )


def test_it_is_what_transformers_logits_say(place: Path, units: Tensor) -> None:
    teacher, student = _evaluate(place, "student")
    assert (teacher.model, student.model) == ("teacher", "student")
    log_t, log_s = (_logits(place / name, units).log_softmax(-1) for name in ("teacher", "student"))
    labels = units[:, 1:].flatten()
    for found, log_p in ((teacher, log_t), (student, log_s)):
        cross_entropy = torch.nn.functional.nll_loss(log_p, labels).item()
        assert found.tokens == UNITS * SEQUENCE
        assert found.cross_entropy == pytest.approx(cross_entropy, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(cross_entropy), rel=1e-4)
        nats_of_the_split = cross_entropy * UNITS * SEQUENCE
        assert found.bits_per_byte == pytest.approx(nats_of_the_split / math.log(2) / TEXT_BYTES, rel=1e-5)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean().item()
    assert kl > 0.1, "the models must differ, or the case tests nothing"
    assert student.kl == pytest.approx(kl, rel=1e-4)
    assert student.agreement == pytest.approx((log_t.argmax(-1) == log_s.argmax(-1)).double().mean().item())
    assert teacher.kl == pytest.approx(0.0, abs=1e-6)
    assert teacher.agreement == 1.0


def test_whole_documents_are_read_by_themselves(place: Path, tmp_path: Path) -> None:
    """Each document alone through transformers, padding left out; without its text bytes there are no bits a byte."""
    units = random_units(6, seed=3, sequence=SEQUENCE, vocab=VOCAB, full=False)
    write_split(tmp_path, units, vocab=VOCAB, packer="bestfit", text_bytes=None)
    (found,) = evaluate([place / "student"], tmp_path / "manifest.json", teacher=None, batch=4)
    model = AutoModelForCausalLM.from_pretrained(place / "student")
    nats, count = 0.0, 0
    for unit in units:
        for start, stop in itertools.pairwise(unit.bounds.tolist()):
            document = torch.from_numpy(unit.tokens[start:stop].astype(np.int64))
            if len(document) > 1:
                with torch.no_grad():
                    log_p = model(input_ids=document[None, :-1]).logits[0, :, :VOCAB].double().log_softmax(-1)
                nats += torch.nn.functional.nll_loss(log_p, document[1:], reduction="sum").item()
                count += len(document) - 1
    assert found.tokens == count
    assert found.cross_entropy == pytest.approx(nats / count, rel=1e-5)
    assert found.bits_per_byte is None
    shown = io.StringIO()
    Console(file=shown, width=100).print(table([found]))
    assert f"{found.cross_entropy:.4f}" in shown.getvalue()


def test_parameters_are_counted_once_where_they_are_tied(place: Path) -> None:
    teacher, student = _evaluate(place, "student")
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    assert student.parameters == 2 * layer + 32 + VOCAB * 32
    assert teacher.parameters == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(place / "teacher").parameters()
    )


def test_the_batch_does_not_matter_and_a_teacher_among_the_models_comes_once(place: Path) -> None:
    one, many = _evaluate(place, "student", "teacher", batch=1), _evaluate(place, "teacher", "student", batch=100)
    assert [found.model for found in one] == [found.model for found in many] == ["teacher", "student"]
    for a, b in zip(one, many, strict=True):
        assert a.cross_entropy == pytest.approx(b.cross_entropy, rel=1e-6)


def test_without_a_teacher_there_is_no_divergence(place: Path) -> None:
    (found,) = _evaluate(place, "student", teacher=False)
    assert found.kl is None
    assert found.agreement is None
    assert found.cross_entropy == pytest.approx(_evaluate(place, "student")[1].cross_entropy, rel=1e-6)
    assert found.model == "student"


def test_a_model_of_another_vocabulary_is_refused(place: Path, tmp_path: Path) -> None:
    small = _saved(tmp_path / "small", {**MODEL, "vocab_size": VOCAB - 1}, seed=3)
    with pytest.raises(UserError, match=f"small: a vocabulary of {VOCAB - 1} ids, .* {VOCAB}"):
        evaluate([small], place / "heldout" / "manifest.json", teacher=None, batch=1)
    with pytest.raises(UserError, match="--batch 0"):
        _evaluate(place, "student", batch=0)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/hf", "runs/b/hf"], ["a/hf", "b/hf"]),
        (["runs/a", "runs/a/hf"], ["a", "a/hf"]),
        (["one/x", "two/y/z"], ["one/x", "two/y/z"]),
    ],
)
def test_names_are_short_and_tell_the_models_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _short_names([Path(folder) for folder in folders]) == names


LARGE = Evaluation(
    model="teachers/a-model-with-quite-a-long-name-of-its-own/step-00100000",
    parameters=405_853_388_800,
    tokens=1_000_000_000,
    cross_entropy=11.9221,
    perplexity=150_555.25,
    bits_per_byte=12.3456,
    kl=10.4321,
    agreement=1.0,
)


def test_the_table_fits_a_terminal_and_hides_nothing() -> None:
    out = io.StringIO()
    small = Evaluation("s", 1, 2, 0.5, 1.6487, 0.25, None, None)
    Console(file=out, width=80).print(table([LARGE, small]))
    said = out.getvalue()
    assert "…" not in said
    assert max(len(line) for line in said.splitlines()) <= 80
    for part in ("1,000,000,000 tokens", "405,853,388,800", "11.9221", "150555.25", "12.3456", "10.4321", "100.0%"):
        assert part in said, part
    first_cells = "".join(line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│"))
    assert LARGE.model in first_cells, "a long name is folded, not cut"
    assert said.count(" - ") == 2, "no teacher, no number"


def test_the_json_is_the_table(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluation.json"
    write_json([LARGE], path)
    assert json.loads(path.read_text(encoding="utf-8")) == [asdict(LARGE)]


def test_a_model_with_too_few_positions_is_refused(place: Path, tmp_path: Path) -> None:
    short = _saved(tmp_path / "short", {**STUDENT, "max_position_embeddings": SEQUENCE - 1}, seed=3)
    with pytest.raises(UserError, match=f"{SEQUENCE - 1} positions.* {SEQUENCE} tokens"):
        evaluate([short], place / "heldout" / "manifest.json", teacher=None, batch=2)


def test_numbers_that_are_not_finite_are_a_fault(place: Path, tmp_path: Path) -> None:
    broken = _saved(tmp_path / "broken", STUDENT, seed=3)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OperatorFault, match=r"broken: .* not finite"):
        evaluate([broken], place / "heldout" / "manifest.json", teacher=None, batch=2)
