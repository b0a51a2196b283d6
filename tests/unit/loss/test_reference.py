"""The reference against torch's own losses, in float64."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megadistill.loss import Divergence, reference
from megadistill.types import IGNORED_LABEL, METRIC_NAMES, LossTerms, Tail
from tests.unit.loss.problems import Problem, problem, sparse, truth


def _logits(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    student = (p.student_hidden @ p.student_weight.T)[:, : p.size]
    teacher = (p.teacher_hidden @ p.teacher_weight.T)[:, : p.size]
    return student, teacher


def _terms(p: Problem, divergence: Divergence) -> LossTerms:
    return truth(p, divergence).terms


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_is_torchs_kl_div(temperature: float, squared: bool) -> None:
    p = problem(1)
    student, teacher = _logits(p)
    log_p_s, log_p_t = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    kl = (F.kl_div(log_p_s, log_p_t, log_target=True, reduction="none").sum(1) * p.token_weights).sum()
    terms = _terms(p, Divergence(temperature=temperature, temperature_squared=squared))
    torch.testing.assert_close(terms.kl, kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.loss.detach(), kl * (temperature**2 if squared else 1.0), rtol=1e-12, atol=0)


def test_kl_and_teacher_entropy_are_torchs_soft_cross_entropy() -> None:
    p = problem(2)
    student, teacher = _logits(p)
    soft = (F.cross_entropy(student, teacher.softmax(1), reduction="none") * p.token_weights).sum()
    terms = _terms(p, Divergence())
    torch.testing.assert_close(terms.kl + terms.teacher_entropy, soft, rtol=1e-12, atol=0)


def test_label_terms_are_torchs_cross_entropy() -> None:
    p = problem(3)
    student, teacher = _logits(p)
    terms = _terms(p, Divergence(temperature=2.0, ce_weight=0.25, z_loss=0.5))
    for logits, found in ((student, terms.student_ce), (teacher, terms.teacher_ce)):
        ce = F.cross_entropy(logits, p.labels, ignore_index=IGNORED_LABEL, reduction="none")
        torch.testing.assert_close(found, (ce * p.token_weights).sum(), rtol=1e-12, atol=0)
    log_z = student.logsumexp(1)
    torch.testing.assert_close(terms.log_z, (log_z * p.token_weights).sum(), rtol=1e-12, atol=0)
    expected = terms.kl + 0.25 * terms.student_ce + 0.5 * (log_z.square() * p.token_weights).sum()
    torch.testing.assert_close(terms.loss.detach(), expected, rtol=1e-12, atol=0)
    same = student.argmax(1) == teacher.argmax(1)
    torch.testing.assert_close(terms.agreement, (same * p.token_weights).sum(), rtol=1e-12, atol=0)


def test_the_label_loss_is_the_distillation_loss_without_its_teacher() -> None:
    p = problem(4)
    labels, distilled = truth(p, None, z_loss=0.1), truth(p, Divergence(kd_weight=0.0, ce_weight=1.0, z_loss=0.1))
    assert torch.equal(labels.terms.loss, distilled.terms.loss)
    assert torch.equal(labels.hidden_grad, distilled.hidden_grad)
    assert torch.equal(labels.weight_grad, distilled.weight_grad)
    assert labels.terms.kl == labels.terms.teacher_ce == labels.terms.teacher_entropy == labels.terms.agreement == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    p = problem(5).cast(dtype)
    terms = reference.distill_loss(
        p.student,
        p.teacher,
        p.labels,
        token_weights=p.token_weights,
        divergence=Divergence(ce_weight=1.0, z_loss=0.1),
        vocab_size=p.size,
    )
    assert {getattr(terms, name).dtype for name in METRIC_NAMES} == {dtype}
    assert all(not getattr(terms, name).requires_grad for name in METRIC_NAMES if name != "loss")


def test_a_sparse_loss_with_an_other_event_stays_in_its_dtype() -> None:
    p = problem(6)
    targets = sparse(p, Tail.OTHER, kept=4)
    single = p.cast(torch.float32)
    shared: dict[str, Any] = {"divergence": Divergence(), "vocab_size": p.size, "token_weights": p.token_weights}
    found = reference.sparse_distill_loss(single.student, targets, p.labels, **shared)
    expected = reference.sparse_distill_loss(p.student, targets, p.labels, **shared)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
