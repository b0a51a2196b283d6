"""The operator in one process against the reference in float64: values, gradients, and what its docstring promises."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadistill.loss import Divergence, DivergenceKind, Head, LossOptions, VocabSlice, buffers, distill_loss
from megadistill.loss.chunk import Chunk
from megadistill.loss.gradients import Gradients
from megadistill.types import IGNORED_LABEL, METRIC_NAMES, LossTerms, SparseTargets, Tail
from tests.unit.loss.problems import (
    DIVERGENCES,
    TAILS,
    TOLERANCE,
    LargeStorages,
    Problem,
    Truth,
    assert_same,
    assert_terms,
    problem,
    relative_error,
    run,
    scalars,
    sparse,
    truth,
)

ALL_TERMS = DIVERGENCES["all"]


def _run(p: Problem, divergence: Divergence | None, *, chunk_tokens: int = 4, **options: Any) -> Truth:
    """The operator and its backward, on the whole vocabulary; `divergence=None` is the label loss."""
    vocab = VocabSlice.contiguous(0, p.student_weight.shape[0], p.size)
    models = 1 if divergence is None or options.get("targets") is not None else 2
    memory = chunk_tokens * models * vocab.true_rows * (8 if p.student_hidden.dtype == torch.float64 else 4)
    return run(p, divergence, vocab=vocab, logit_memory=memory, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_distill_loss_is_the_reference(name: str, dtype: torch.dtype) -> None:
    p, divergence = problem(1), DIVERGENCES[name]
    found = _run(p.cast(dtype), divergence, diagnostics=True)
    assert_same(found, truth(p, divergence, diagnostics=True), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_softcap_scale_bias_and_ids_that_the_teacher_does_not_know(name: str, dtype: torch.dtype) -> None:
    p, divergence = problem(1).bent(), DIVERGENCES[name]
    if divergence.formula is DivergenceKind.REVERSE_KL:  # infinite where the teacher does not know an id
        assert p.teacher_bias is not None
        p = replace(p, teacher_bias=p.teacher_bias.clamp_min(-3))
    found = _run(p.cast(dtype), divergence, diagnostics=True)
    assert_same(found, truth(p, divergence, diagnostics=True), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_label_loss_is_the_reference(z_loss: float, dtype: torch.dtype) -> None:
    for p in (problem(2), problem(2).bent()):
        assert_same(_run(p.cast(dtype), None, z_loss=z_loss), truth(p, None, z_loss=z_loss), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept", [1, 3, 21])
@pytest.mark.parametrize("name", TAILS)
def test_sparse_distill_loss_is_the_reference(name: str, kept: int, dtype: torch.dtype) -> None:
    tail, divergence = TAILS[name]
    for p in (problem(1), problem(1).bent()):
        targets = sparse(p, tail, kept=kept, temperature=divergence.temperature)
        found = _run(p.cast(dtype), divergence, targets=targets)
        assert_same(found, truth(p, divergence, targets=targets), TOLERANCE[dtype])


def test_everything_kept_is_the_full_kl_and_a_bucket_is_a_lower_bound() -> None:
    """The data-processing inequality; and the reference of the sparse loss held against that of the full one."""
    p = replace(problem(30), token_weights=torch.full((13,), 1 / 13, dtype=torch.float64))
    log_p_t = (p.teacher_hidden @ p.teacher_weight[:21].T).log_softmax(1)
    ids = log_p_t.argsort(dim=1, descending=True)
    bound = []
    for kept in (1, 5, 20, 21):
        probs = log_p_t.gather(1, ids[:, :kept]).exp()
        tail = log_p_t.gather(1, ids[:, kept:]).logsumexp(1)
        bound.append(_run(p, Divergence(), targets=SparseTargets(ids[:, :kept], probs, tail, Tail.OTHER)))
    full = truth(p, Divergence())
    assert all(found.terms.kl == 0 for found in bound), "targets hold a part of the distribution"
    values = [found.terms.divergence.item() for found in bound]
    assert values[0] < values[1] < values[2] - 1e-3
    assert values[1] < full.terms.kl.item() * 0.999
    assert_same(bound[-1], replace(full, terms=bound[-1].terms), 1e-12)
    assert values[-1] == pytest.approx(full.terms.kl.item(), rel=1e-12)


@pytest.mark.parametrize("log_mass", [math.log(6e-7), math.log(1e-9)])
def test_a_small_tail_keeps_its_gradient_in_float32(log_mass: float) -> None:
    """Where 1 - Σ in float32 has lost the tail: the gradient outside of the kept ids, against float64."""
    p = problem(31, tokens=6, D=8, rows=40, size=40)
    ids = torch.arange(3).expand(6, 3)
    tall = replace(p, student_weight=p.student_weight.clone(), student_hidden=p.student_hidden.abs())
    tall.student_weight[:3] = tall.student_weight[:3].abs() + 2.5  # the student's tail is small too
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(6, 3) * (1 - math.exp(log_mass))
    log_tail = torch.full((6,), log_mass, dtype=torch.float64)
    targets = SparseTargets(ids, probs, log_tail, Tail.OTHER)
    found, expected = (
        _run(tall.cast(torch.float32), Divergence(), targets=targets),
        truth(tall, Divergence(), targets=targets),
    )
    assert relative_error(found.weight_grad[3:], expected.weight_grad[3:]) < 1e-5


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 9),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.integers(1, 17),
    padding=st.integers(0, 3),
    chunk_tokens=st.integers(1, 12),
    scale=st.sampled_from([1e-4, 1.0, 30.0]),
    divergence=st.sampled_from(list(DIVERGENCES.values())),
    block=st.sampled_from([1, 20, 1 << 18]),
)
def test_any_shape_chunk_and_magnitude(
    seed: int,
    tokens: int,
    widths: tuple[int, int],
    size: int,
    padding: int,
    chunk_tokens: int,
    scale: float,
    divergence: Divergence,
    block: int,
) -> None:
    p = problem(seed, tokens=tokens, D=widths[0], E=widths[1], rows=size + padding, size=size, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "BLOCK_ELEMENTS", block)
        found = _run(p, divergence, chunk_tokens=chunk_tokens)
    expected = truth(p, divergence)
    far = scale > 1 and divergence.formula is DivergenceKind.TVD  # p_s - p_t of nearly certain models: absolute error
    assert_terms(found.terms, expected.terms, 1e-10, absolute=1e-12)
    assert found.terms.kl >= 0
    assert found.terms.divergence >= -1e-15
    atol = 1e-12 * max(1.0, scale) * (10 if far else 1)
    torch.testing.assert_close(found.hidden_grad, expected.hidden_grad, rtol=1e-10, atol=atol)
    torch.testing.assert_close(found.weight_grad, expected.weight_grad, rtol=1e-10, atol=atol)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 9),
    size=st.integers(1, 17),
    kept=st.integers(1, 20),
    chunk_tokens=st.integers(1, 12),
    name=st.sampled_from(list(TAILS)),
)
def test_any_sparse_targets(seed: int, tokens: int, size: int, kept: int, chunk_tokens: int, name: str) -> None:
    p, (tail, divergence) = problem(seed, tokens=tokens, rows=size + 1, size=size), TAILS[name]
    targets = sparse(p, tail, kept=kept, temperature=divergence.temperature, seed=seed)
    found, expected = (
        _run(p, divergence, chunk_tokens=chunk_tokens, targets=targets),
        truth(p, divergence, targets=targets),
    )
    assert_terms(found.terms, expected.terms, 1e-10, absolute=1e-12)
    torch.testing.assert_close(found.hidden_grad, expected.hidden_grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.weight_grad, expected.weight_grad, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_the_central_difference_of_the_value() -> None:
    """Central differences of the operator's own value: independent of the reference's autograd."""
    p, step = problem(3), 1e-5
    found = _run(p, ALL_TERMS, upstream=3.0)
    for name, gradient in (("student_hidden", found.hidden_grad), ("student_weight", found.weight_grad)):
        start = getattr(p, name)
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        ahead = _run(replace(p, **{name: start + step * direction}), ALL_TERMS).terms.loss
        behind = _run(replace(p, **{name: start - step * direction}), ALL_TERMS).terms.loss
        slope = 3.0 * (ahead - behind).item() / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize("kind", DivergenceKind)
def test_of_equal_logits_every_divergence_is_zero_and_has_no_gradient(kind: DivergenceKind) -> None:
    p = problem(5, D=6, E=6).cast(torch.float32)
    found = _run(replace(p, teacher_hidden=p.student_hidden, teacher_weight=p.student_weight), Divergence(kind))
    assert found.terms.kl == found.terms.divergence == found.terms.loss == 0
    assert found.terms.agreement.item() == pytest.approx(p.token_weights.sum().item(), rel=1e-6)
    assert not found.hidden_grad.any()
    assert not found.weight_grad.any()


@pytest.mark.parametrize("name", ["reverse kl", "jsd", "jsd of 0.9 at 2", "skew kl", "skew kl of 0.7 at 2"])
def test_other_small_divergences_keep_their_digits_in_float32(name: str) -> None:
    p, divergence = problem(6, tokens=16, D=32, E=32, rows=512, size=512, scale=0.3), DIVERGENCES[name]
    noise = torch.randn(512, 32, generator=torch.Generator().manual_seed(7)) * 1e-3
    student = replace(p, student_hidden=p.teacher_hidden, student_weight=(p.teacher_weight + noise).float().double())
    found, expected = _run(student.cast(torch.float32), divergence), truth(student, divergence)
    value = expected.terms.divergence.item() / p.token_weights.sum().item()
    assert 1e-8 < value < 5e-6
    assert found.terms.divergence.item() == pytest.approx(expected.terms.divergence.item(), rel=2e-3)


@pytest.mark.parametrize("distance", [1e-3, 3e-5])
def test_a_small_kl_keeps_its_digits_in_float32(distance: float) -> None:
    """At KL ≈ 5e-7, where the sum of p (ln p - ln q) in float32 has lost every digit."""
    p = problem(6, tokens=16, D=32, E=32, rows=512, size=512, scale=0.3)
    noise = torch.randn(512, 32, generator=torch.Generator().manual_seed(7)) * distance
    student = replace(p, student_hidden=p.teacher_hidden, student_weight=(p.teacher_weight + noise).float().double())
    found, expected = _run(student.cast(torch.float32), Divergence()), truth(student, Divergence())
    kl = expected.terms.kl.item() / p.token_weights.sum().item()
    assert 1e-10 < kl < 5e-6
    assert found.terms.kl.item() == pytest.approx(expected.terms.kl.item(), rel=1e-3 * max(1.0, 3e-4 / distance))
    log_p_t = (student.teacher_hidden @ student.teacher_weight.T).float().log_softmax(1)
    log_p_s = (student.student_hidden @ student.student_weight.T).float().log_softmax(1)
    naive = ((log_p_t.exp() * (log_p_t - log_p_s)).sum(1) * p.token_weights).sum().item()
    assert abs(naive - expected.terms.kl.item()) > 10 * abs(found.terms.kl.item() - expected.terms.kl.item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_of_ten_thousand(temperature: float, dtype: torch.dtype) -> None:
    """Student and teacher certain of different ids, in both directions: no overflow, and the right KL of about 2e4."""
    signs = torch.randint(0, 2, (12, 5), generator=torch.Generator().manual_seed(8)).double() * 2 - 1
    p = replace(
        problem(9, tokens=5, rows=12, size=12),
        student_hidden=torch.eye(5, dtype=torch.float64) * 100,
        student_weight=signs * 100 + torch.arange(12).double().unsqueeze(1) / 4,
        teacher_hidden=torch.eye(5, dtype=torch.float64) * 100,
        teacher_weight=-signs * 100 + torch.arange(12).double().unsqueeze(1) / 4,
    )
    divergence = Divergence(temperature=temperature, ce_weight=1.0, z_loss=1e-6)
    expected = truth(p, divergence)
    assert expected.terms.kl > 1e3
    assert_same(_run(p.cast(dtype), divergence), expected, TOLERANCE[dtype])


def test_a_constant_added_to_a_row_of_logits_changes_nothing() -> None:
    """The terms bit for bit: the inputs are dyadic, so that the float32 logits are exact with and without it."""
    p = problem(10)
    dyadic = replace(
        p,
        **{
            name: (getattr(p, name) * 32).round() / 32
            for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
        },
    ).cast(torch.float32)
    shifted = replace(
        dyadic,
        student_hidden=torch.cat([dyadic.student_hidden, torch.full((13, 1), 512.0)], dim=1),
        student_weight=torch.cat([dyadic.student_weight, torch.ones(24, 1)], dim=1),
        teacher_hidden=torch.cat([dyadic.teacher_hidden, torch.full((13, 1), -256.0)], dim=1),
        teacher_weight=torch.cat([dyadic.teacher_weight, torch.ones(24, 1)], dim=1),
    )
    divergence = Divergence(temperature=2.0, ce_weight=0.5)
    before, after = _run(dyadic, divergence), _run(shifted, divergence)
    for name in METRIC_NAMES[:-1]:  # all but log Z, which moves with the constant
        assert torch.equal(getattr(before.terms, name), getattr(after.terms, name)), name
    # Products of another width may add in another order.
    assert relative_error(after.hidden_grad[:, :5], before.hidden_grad) < 1e-6
    assert relative_error(after.weight_grad[:, :5], before.weight_grad) < 1e-6


def test_a_token_without_a_label_keeps_its_kl_and_z_loss() -> None:
    p = problem(11)
    unlabelled = replace(p, labels=torch.full_like(p.labels, IGNORED_LABEL))
    found = _run(unlabelled, ALL_TERMS)
    assert found.terms.student_ce == found.terms.teacher_ce == 0
    without_ce = replace(ALL_TERMS, ce_weight=0.0)
    assert relative_error(found.hidden_grad, truth(p, without_ce).hidden_grad) < 1e-12
    assert relative_error(found.weight_grad, truth(p, without_ce).weight_grad) < 1e-12


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_token_of_weight_zero_is_not_there(poison: float) -> None:
    p = problem(12)
    dead = p.token_weights == 0
    assert dead.any()
    poisoned = replace(p, student_hidden=p.student_hidden.clone(), teacher_hidden=p.teacher_hidden.clone())
    poisoned.student_hidden[dead] = poison
    poisoned.teacher_hidden[dead] = poison
    clean, found = _run(p, ALL_TERMS), _run(poisoned, ALL_TERMS)
    assert torch.equal(found.terms.metrics(), clean.terms.metrics())
    assert torch.equal(found.hidden_grad, clean.hidden_grad)
    assert torch.equal(found.weight_grad, clean.weight_grad)
    assert not found.hidden_grad[dead].any()


def test_deciles_are_of_the_tokens_that_are_there() -> None:
    """The hidden states of a token of weight 0 are zeros: here that would make it the surest of all."""
    p = problem(12, scale=4.0)
    bias = torch.zeros(24).double()
    bias[3] = 20.0
    sure = replace(p, teacher_bias=bias, teacher_hidden=torch.cat([p.teacher_hidden, torch.ones(13, 1)], dim=1))
    column = torch.zeros(24, 1).double()
    column[3] = -20.0  # undoes the bias where the hidden states are not zeros
    sure = replace(sure, teacher_weight=torch.cat([p.teacher_weight, column], dim=1))
    assert_same(_run(sure, Divergence(), diagnostics=True), truth(sure, Divergence(), diagnostics=True), 1e-12)


def test_a_token_of_weight_zero_costs_no_infinity() -> None:
    """Its label is an id that the teacher does not know, and so reverse KL is infinite there."""
    p = problem(12)
    bias = torch.zeros(24).double()
    bias[7] = -math.inf
    dead = replace(
        p, teacher_bias=bias, labels=torch.full_like(p.labels, 7), token_weights=torch.zeros_like(p.token_weights)
    )
    terms = _run(dead, Divergence(DivergenceKind.REVERSE_KL), diagnostics=True).terms
    assert set(scalars(terms).values()) == {0.0}


def test_targets_of_a_token_of_weight_zero_are_not_read() -> None:
    p = problem(12)
    targets, dead = sparse(p, Tail.OTHER, kept=4), p.token_weights == 0
    poisoned = replace(targets, probs=targets.probs.clone(), log_tail=targets.log_tail.clone())
    poisoned.probs[dead] = math.nan
    poisoned.log_tail[dead] = math.inf
    clean, found = _run(p, Divergence(), targets=targets), _run(p, Divergence(), targets=poisoned)
    assert torch.equal(found.terms.metrics(), clean.terms.metrics())
    assert torch.equal(found.hidden_grad, clean.hidden_grad)
    assert torch.equal(found.weight_grad, clean.weight_grad)


def test_padding_rows_are_never_read_and_get_no_gradient() -> None:
    p = problem(13)
    poisoned = replace(p, student_weight=p.student_weight.clone(), teacher_weight=p.teacher_weight.clone())
    poisoned.student_weight[p.size :] = float("nan")
    poisoned.teacher_weight[p.size :] = 1e9
    found = _run(poisoned, ALL_TERMS)
    assert_same(found, truth(p, ALL_TERMS), 1e-12)
    assert not found.weight_grad[p.size :].any()


def test_of_equal_logits_the_lowest_id_is_the_most_likely() -> None:
    p = replace(problem(14, tokens=1), student_weight=torch.zeros(24, 5).double(), token_weights=torch.ones(1).double())
    best = torch.zeros(24, 7).double()
    best[0] = p.teacher_hidden[0]
    assert _run(replace(p, teacher_weight=best), Divergence()).terms.agreement == 1
    assert _run(replace(p, teacher_weight=best.roll(1, dims=0)), Divergence()).terms.agreement == 0


def _call(p: Problem, hidden: Tensor, weight: Tensor) -> LossTerms:
    vocab = VocabSlice.contiguous(0, weight.shape[0], p.size)
    return distill_loss(
        Head(hidden, weight),
        p.teacher,
        p.labels,
        token_weights=p.token_weights,
        divergence=ALL_TERMS,
        vocab=vocab,
        options=LossOptions(logit_memory=4 * 2 * 21 * 8),
    )


def test_backward_twice_is_an_error() -> None:
    p = problem(16)
    terms = _call(p, p.student_hidden.requires_grad_(), p.student_weight)
    torch.autograd.backward(terms.loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        torch.autograd.backward(terms.loss)


def test_only_the_loss_is_differentiable_and_the_teacher_gets_nothing() -> None:
    p = problem(17)
    p.teacher_hidden.requires_grad_()
    p.teacher_weight.requires_grad_()
    terms = _call(p, p.student_hidden.requires_grad_(), p.student_weight.requires_grad_())
    assert [name for name in METRIC_NAMES if getattr(terms, name).requires_grad] == ["loss"]
    torch.autograd.backward(terms.loss)
    assert p.teacher_hidden.grad is None
    assert p.teacher_weight.grad is None


def test_no_gradient_work_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(18)
    expected = truth(p, ALL_TERMS)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("gradient work")

    monkeypatch.setattr(Gradients, "empty", refuse)
    with torch.no_grad():
        terms = _call(p, p.student_hidden.clone().requires_grad_(), p.student_weight)
    for found in (terms, _call(p, p.student_hidden, p.student_weight)):
        assert not found.loss.requires_grad
        assert found.loss.item() == pytest.approx(expected.terms.loss.item(), rel=1e-12)
    with pytest.raises(AssertionError, match="gradient work"):
        _call(p, p.student_hidden, p.student_weight.requires_grad_())


def test_memory_is_two_chunks_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_tokens, size = 32, 200
    monkeypatch.setattr(buffers, "BLOCK_ELEMENTS", 2 * size)
    monkeypatch.setattr(buffers, "_spare", [])
    p = problem(19, tokens=96, rows=size, size=size).cast(torch.float32)
    with LargeStorages(chunk_tokens * size * 4) as large:
        _run(p, ALL_TERMS, chunk_tokens=chunk_tokens)
    assert [storage.nbytes() for storage in large.kept.values()] == [2 * chunk_tokens * size * 4]
    with LargeStorages(chunk_tokens * size * 4) as again:
        _run(p, ALL_TERMS, chunk_tokens=chunk_tokens)
    assert again.kept.keys() == large.kept.keys(), "a second call takes the first one's memory"


def test_memory_that_is_taken_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_spare", [])
    like = torch.zeros(0)
    first, second = buffers.take(100, like), buffers.take(100, like)
    assert first.data_ptr() != second.data_ptr()
    buffers.give(first)
    assert buffers.take(60, like).data_ptr() == first.data_ptr()
    buffers.give(second)
    assert buffers.take(60, like.double()).data_ptr() != second.data_ptr(), "of another dtype"
    buffers.give(second)
    assert buffers.take(101, like).numel() == 101, "too small to serve"


def test_a_call_that_fails_half_way_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p, expected = problem(24), truth(problem(24), ALL_TERMS)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(Chunk, "write_dlogits", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            _run(p, ALL_TERMS)
    assert_same(_run(p, ALL_TERMS), expected, 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(12, 5).double()}, r"student hidden states \[12, 5\].*13 tokens"),
        ({"student_weight": torch.zeros(24, 4).double()}, r"student hidden states \[13, 5\] and head \[24, 4\]"),
        ({"student_weight": torch.zeros(24, 5)}, "cast both"),
        ({"token_weights": torch.zeros(12)}, r"\[12\] token weights for 13 labels"),
        ({"labels": torch.full((13,), 21)}, r"\[13\] labels \(by rank\).*below 21"),
        ({"labels": torch.full((13,), -1)}, "mark positions without a label with -100"),
        ({"size": 25}, "do not add up to a vocabulary of 25"),
        ({"teacher_weight": torch.zeros(20, 7).double()}, r"teacher.*head \[20, 7\]"),
        ({"student_bias": torch.zeros(21).double()}, r"student bias \[21\].*\[24, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(replace(problem(20), **change), ALL_TERMS)


def test_a_chunk_needs_some_memory() -> None:
    with pytest.raises(ValueError, match="logit_memory is 0 bytes"):
        _run(problem(21), ALL_TERMS, chunk_tokens=0)


def test_the_teachers_padding_may_be_another() -> None:
    p = problem(22)
    wider = replace(p, teacher_weight=torch.cat([p.teacher_weight[:21], torch.full((9, 7), math.nan).double()]))
    assert_same(_run(wider, ALL_TERMS), truth(p, ALL_TERMS), 1e-12)


@pytest.mark.parametrize(
    ("change", "divergence", "message"),
    [
        ({}, Divergence(DivergenceKind.JSD), "jsd needs the teacher's whole distribution"),
        ({}, Divergence(label_fraction=0.1), "label_fraction needs the teacher's entropy"),
        ({}, Divergence(temperature=2.0), r"made at temperature 1.0, the loss is at 2.0"),
        ({"ids": torch.full((13, 3), 21)}, Divergence(), r"\[39\] target ids \(by rank\) are not below 21"),
        ({"probs": torch.zeros(13, 2).double()}, Divergence(), r"ids \[13, 3\], probs \[13, 2\]"),
    ],
)
def test_sparse_targets_that_do_not_fit_are_refused(
    change: dict[str, Any], divergence: Divergence, message: str
) -> None:
    p = problem(23)
    with pytest.raises(ValueError, match=message):
        _run(p, divergence, targets=replace(sparse(p, Tail.OTHER, kept=3), **change))
