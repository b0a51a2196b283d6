"""Evaluation against transformers' own logits, densely and in float64.

Legend: U units, S tokens of a sequence, V true vocabulary, P rows of a model that has padding.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.data.shards.packing import PackedSequence
from megadistill.distributed.launch import Launch
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.evaluate import evaluate, ranks
from megadistill.evaluate.evaluation import Evaluation
from megadistill.heldout.splits import load_splits, short_names
from megadistill.models.families import load_config
from tests.unit.data.splits import random_sequences, write_split

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
    rows = [PackedSequence(unit.astype(np.int32), whole) for unit in units.numpy()]
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


def _measured(
    models: list[Path], data: list[str] | Path, *, teacher: Path | None = None, batch: int = 3, limit: int | None = None
) -> list[Evaluation]:
    given = data if isinstance(data, list) else [str(data / "manifest.json")]
    with ranks(Launch(rank=0, world=1, local_rank=0, local_world=1)) as alone:
        return evaluate(
            models,
            load_splits(given, limit),
            teacher=teacher,
            batch=batch,
            topology=alone,
            progress=lambda stage, *, done, total, tokens=None: None,
        )


def _evaluate(place: Path, *models: str, teacher: bool = True, batch: int = 3) -> list[Evaluation]:
    return _measured(
        [place / model for model in models],
        place / "heldout",
        teacher=place / "teacher" if teacher else None,
        batch=batch,
    )


def test_it_is_what_transformers_logits_say(place: Path, units: Tensor) -> None:
    teacher, student = _evaluate(place, "student")
    assert (teacher.model, student.model) == ("teacher", "student")
    log_t, log_s = (_logits(place / name, units).log_softmax(-1) for name in ("teacher", "student"))
    labels = units[:, 1:].flatten()
    for result, log_p in ((teacher, log_t), (student, log_s)):
        cross_entropy = torch.nn.functional.nll_loss(log_p, labels).item()
        assert result.tokens == UNITS * SEQUENCE
        assert result.cross_entropy == pytest.approx(cross_entropy, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(cross_entropy), rel=1e-4)
        nats_of_the_split = cross_entropy * UNITS * SEQUENCE
        assert result.bits_per_byte == pytest.approx(nats_of_the_split / math.log(2) / TEXT_BYTES, rel=1e-5)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean().item()
    assert kl > 0.1, "the models must differ, or the case tests nothing"
    assert student.kl == pytest.approx(kl, rel=1e-4)
    assert student.agreement == pytest.approx((log_t.argmax(-1) == log_s.argmax(-1)).double().mean().item())
    m = torch.logaddexp(log_t, log_s) - math.log(2)
    jsd = 0.5 * ((log_t.exp() * (log_t - m)) + (log_s.exp() * (log_s - m))).sum(-1).mean().item()
    assert student.jsd == pytest.approx(jsd, rel=1e-4)
    assert student.acceptance == pytest.approx(torch.minimum(log_t.exp(), log_s.exp()).sum(-1).mean().item(), rel=1e-4)
    assert teacher.kl == pytest.approx(0.0, abs=1e-6)
    assert teacher.jsd == pytest.approx(0.0, abs=1e-6)
    assert teacher.acceptance == pytest.approx(1.0, abs=1e-6)
    assert teacher.agreement == 1.0


def test_the_deciles_are_tenths_by_teacher_entropy(place: Path, units: Tensor) -> None:
    _, student = _evaluate(place, "student")
    log_t, log_s = (_logits(place / name, units).log_softmax(-1) for name in ("teacher", "student"))
    entropy = -(log_t.exp() * log_t).sum(-1)
    order = entropy.argsort()
    N = UNITS * SEQUENCE
    assert student.by_decile is not None
    assert [decile.tokens for decile in student.by_decile] == [12, 11, 11, 11, 11, 12, 11, 11, 11, 11]
    assert sum(decile.tokens for decile in student.by_decile) == N
    start = 0
    for decile in student.by_decile:
        here = order[start : start + decile.tokens]
        start += decile.tokens
        labels = units[:, 1:].flatten()[here]
        assert decile.bounds == pytest.approx((entropy[here[0]].item(), entropy[here[-1]].item()), rel=1e-5)
        assert decile.cross_entropy == pytest.approx(torch.nn.functional.nll_loss(log_s[here], labels).item(), rel=1e-5)
        kl = (log_t[here].exp() * (log_t[here] - log_s[here])).sum(-1).mean().item()
        assert decile.kl == pytest.approx(kl, rel=1e-4)
        agreement = (log_t[here].argmax(-1) == log_s[here].argmax(-1)).double().mean().item()
        assert decile.agreement == pytest.approx(agreement)


def test_calibration_is_counted_in_21_bins(place: Path, units: Tensor) -> None:
    (result,) = _evaluate(place, "student", teacher=False)
    confidence, best = _logits(place / "student", units).softmax(-1).max(-1)
    hit = best == units[:, 1:].flatten()
    error = 0.0
    assert len(result.calibration) == 21
    for number, measured in enumerate(result.calibration):
        here = (confidence * 21).floor().clamp_max(20) == number
        assert measured.count == here.sum().item()
        if measured.count == 0:
            assert (measured.confidence, measured.accuracy) == (None, None)
            continue
        assert measured.confidence == pytest.approx(confidence[here].mean().item(), rel=1e-5)
        assert measured.accuracy == pytest.approx(hit[here].double().mean().item())
        error += abs((confidence[here] - hit[here].double()).sum().item()) / len(hit)
    assert sum(measured.count > 0 for measured in result.calibration) > 3
    assert result.calibration_error == pytest.approx(error, rel=1e-4)


def test_sources_are_measured_together_and_one_by_one(place: Path, tmp_path: Path) -> None:
    other = random_sequences(5, seed=4, sequence=SEQUENCE - 4, vocab=VOCAB)
    write_split(tmp_path / "other", other, vocab=VOCAB, text_bytes=333)
    first, second = str(place / "heldout" / "manifest.json"), str(tmp_path / "other" / "manifest.json")
    models, teacher = [place / "student"], place / "teacher"
    both = _measured(models, [f"web={first}", second], teacher=teacher)[1]
    alone = [_measured(models, [one], teacher=teacher)[1] for one in (first, second)]
    assert [result.source for result in both.by_source] == ["web", "other"]
    for part, whole in zip(both.by_source, alone, strict=True):
        (by_itself,) = whole.by_source
        for name, value in vars(part).items():
            if name != "source":
                assert value == pytest.approx(getattr(by_itself, name), rel=1e-9), name
                assert value == pytest.approx(getattr(whole, name), rel=1e-9), name
    counts = [part.tokens for part in both.by_source]
    assert counts == [UNITS * SEQUENCE, 5 * (SEQUENCE - 4)]
    for name in ("cross_entropy", "kl", "jsd", "acceptance", "agreement"):
        mean = sum(n * getattr(part, name) for n, part in zip(counts, both.by_source, strict=True)) / sum(counts)
        assert getattr(both, name) == pytest.approx(mean, rel=1e-9), name
    nats = both.cross_entropy * sum(counts)
    assert both.bits_per_byte == pytest.approx(nats / math.log(2) / (TEXT_BYTES + 333), rel=1e-9)


def test_splits_that_cannot_be_compared_are_refused(place: Path, tmp_path: Path) -> None:
    first = str(place / "heldout" / "manifest.json")
    with pytest.raises(UserError, match=r"two splits are called heldout: .*web=MANIFEST"):
        load_splits([first, f"heldout={first}"])
    write_split(tmp_path / "wide", random_sequences(2, seed=1, vocab=VOCAB), vocab=VOCAB + 1)
    with pytest.raises(UserError, match=rf"wide has a vocabulary of {VOCAB + 1}, .* has {VOCAB}"):
        load_splits([f"narrow={first}", f"wide={tmp_path / 'wide' / 'manifest.json'}"])
    foreign = random_sequences(2, seed=1, vocab=VOCAB)
    write_split(tmp_path / "foreign", foreign, vocab=VOCAB, tokenizer_sha256="1" * 64)
    with pytest.raises(UserError, match="foreign has the tokenizer 1111"):
        load_splits([f"own={first}", f"foreign={tmp_path / 'foreign' / 'manifest.json'}"])
    one_token = [PackedSequence(np.zeros(SEQUENCE + 1, dtype=np.int32), np.array([0, 1], dtype=np.int32))]
    write_split(tmp_path / "empty", one_token, vocab=VOCAB, packer="bestfit")
    with pytest.raises(UserError, match="empty: it has no token to predict"):
        load_splits([str(tmp_path / "empty" / "manifest.json")])


def test_whole_documents_are_read_by_themselves(place: Path, tmp_path: Path) -> None:
    """Each document alone through transformers, padding left out; without its text bytes there are no bits a byte."""
    units = random_sequences(6, seed=3, sequence=SEQUENCE, vocab=VOCAB, full=False)
    write_split(tmp_path, units, vocab=VOCAB, packer="bestfit", text_bytes=None)
    (result,) = _measured([place / "student"], tmp_path, batch=4)
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
    assert result.tokens == count
    assert result.cross_entropy == pytest.approx(nats / count, rel=1e-5)
    assert result.bits_per_byte is None


def test_parameters_are_counted_once_where_they_are_tied(place: Path) -> None:
    teacher, student = _evaluate(place, "student")
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    assert student.parameters == 2 * layer + 32 + VOCAB * 32
    assert teacher.parameters == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(place / "teacher").parameters()
    )


def test_the_batch_does_not_matter_and_a_teacher_among_the_models_comes_once(place: Path) -> None:
    one, many = _evaluate(place, "student", "teacher", batch=1), _evaluate(place, "teacher", "student", batch=100)
    assert [result.model for result in one] == [result.model for result in many] == ["teacher", "student"]
    for a, b in zip(one, many, strict=True):
        assert a.cross_entropy == pytest.approx(b.cross_entropy, rel=1e-6)


def test_a_limit_reads_the_same_sequences_for_every_model_and_batch(place: Path) -> None:
    heldout, student = place / "heldout", place / "student"
    (split,) = load_splits([str(heldout / "manifest.json")])
    batches = [split.stream().batch(range(slot, slot + 1)) for slot in range(3)]
    first = torch.cat([torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1) for batch in batches]).long()
    expected = F.cross_entropy(_logits(student, first), first[:, 1:].flatten()).item()
    for batch in (1, 2):
        (some,) = _measured([student], heldout, batch=batch, limit=3)
        assert some.tokens == 3 * SEQUENCE
        assert some.cross_entropy == pytest.approx(expected, rel=1e-5)
    assert _measured([student], heldout, limit=UNITS + 1) == _measured([student], heldout)


def test_without_a_teacher_there_is_no_divergence(place: Path) -> None:
    (result,) = _evaluate(place, "student", teacher=False)
    for name in ("kl", "jsd", "agreement", "acceptance", "by_decile"):
        assert getattr(result, name) is None, name
    assert result.by_source[0].kl is None
    assert result.cross_entropy == pytest.approx(_evaluate(place, "student")[1].cross_entropy, rel=1e-6)
    assert result.model == "student"


def test_a_model_of_another_vocabulary_is_refused(place: Path, tmp_path: Path) -> None:
    small = _saved(tmp_path / "small", {**MODEL, "vocab_size": VOCAB - 1}, seed=3)
    with pytest.raises(UserError, match=f"small: its vocabulary has {VOCAB - 1} rows, .* {VOCAB}"):
        _measured([small], place / "heldout")
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
        (["/"], ["/"]),
    ],
)
def test_names_are_short_and_tell_the_models_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_names([Path(folder).resolve().parts for folder in folders]) == names


def test_a_model_with_too_few_positions_is_refused(place: Path, tmp_path: Path) -> None:
    short = _saved(tmp_path / "short", {**STUDENT, "max_position_embeddings": SEQUENCE - 1}, seed=3)
    with pytest.raises(UserError, match=f"{SEQUENCE - 1} positions.* {SEQUENCE} tokens"):
        _measured([short], place / "heldout")


def test_numbers_that_are_not_finite_are_a_fault(place: Path, tmp_path: Path) -> None:
    broken = _saved(tmp_path / "broken", STUDENT, seed=3)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OperatorFault, match=r"broken: .* not finite"):
        _measured([broken], place / "heldout", teacher=place / "teacher")
