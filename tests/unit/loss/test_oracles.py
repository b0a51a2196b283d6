"""The loss against other people's implementations of it: torch's own, and liger-kernel's chunked distillation.

Everything is float64 unless the other side cannot be. A token without a label has weight 0 here, because the others
drop such a token altogether, where `distill_loss` drops its cross-entropy alone.

Legend: N tokens, D student width, E teacher width, V vocabulary.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.loss import Divergence, DivergenceKind, Head, VocabSlice, distill_loss, label_loss
from megadistill.types import IGNORED_LABEL
from tests.unit.loss.problems import TOLERANCE, Problem, problem, relative_error

NOT_INSTALLED = "liger-kernel is not installed: pip install -e '.[oracles]'"
needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no F.linear_cross_entropy: torch 2.13 has"
)
EXACT, ROUNDED = TOLERANCE[torch.float64], TOLERANCE[torch.float32]

JSD, FORWARD, REVERSE, SKEW = (
    DivergenceKind.JSD,
    DivergenceKind.FORWARD_KL,
    DivergenceKind.REVERSE_KL,
    DivergenceKind.SKEW_KL,
)


def _means(seed: int) -> Problem:
    """A problem whose terms are means over the labelled tokens: what torch and liger call reduction "mean"."""
    p = problem(seed, tokens=23, rows=31, size=31)
    labelled = p.labels != IGNORED_LABEL
    weights = labelled / labelled.sum(dtype=torch.float64)
    return Problem(
        p.student_hidden, p.student_weight, p.teacher_hidden, p.teacher_weight, p.labels, weights, size=p.size
    )


def _check(
    p: Problem,
    theirs: Callable[[Tensor, Tensor], Tensor],
    divergence: Divergence | None,
    *,
    value_tolerance: float = EXACT,
    gradient_tolerance: float = EXACT,
) -> None:
    """Value, dX and dW of our loss (`divergence=None`: the label loss) against `theirs(hidden, weight)`."""
    ours_X, ours_W = p.student_hidden.clone().requires_grad_(), p.student_weight.clone().requires_grad_()
    theirs_X, theirs_W = p.student_hidden.clone().requires_grad_(), p.student_weight.clone().requires_grad_()
    vocab = VocabSlice.contiguous(0, p.size, p.size)
    if divergence is None:
        loss = label_loss(Head(ours_X, ours_W), p.labels, token_weights=p.token_weights, vocab=vocab).loss
    else:
        loss = distill_loss(
            Head(ours_X, ours_W),
            p.teacher,
            p.labels,
            token_weights=p.token_weights,
            divergence=divergence,
            vocab=vocab,
        ).loss
    expected = theirs(theirs_X, theirs_W)
    assert loss.item() == pytest.approx(expected.item(), rel=value_tolerance)
    found = torch.autograd.grad(loss, (ours_X, ours_W))
    for gradient, true in zip(found, torch.autograd.grad(expected, (theirs_X, theirs_W)), strict=True):
        assert relative_error(gradient, true) < gradient_tolerance


def _torch_divergence(log_p_t: Tensor, log_p_s: Tensor, divergence: Divergence) -> Tensor:
    """[N]: by `F.kl_div(input, target)`, which is KL(target ‖ input) of two logarithms."""

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)

    share = divergence.share or 0.5  # M is not used where there is none
    log_m = torch.stack([log_p_t + math.log(share), log_p_s + math.log(1 - share)]).logsumexp(dim=0)
    match divergence.kind:
        case DivergenceKind.FORWARD_KL:
            return kl(log_p_t, log_p_s)
        case DivergenceKind.REVERSE_KL:
            return kl(log_p_s, log_p_t)
        case DivergenceKind.JSD:
            return share * kl(log_p_t, log_m) + (1 - share) * kl(log_p_s, log_m)
        case DivergenceKind.SKEW_KL:
            return kl(log_p_t, log_m)
    raise AssertionError(f"F.kl_div does not make {divergence.kind}")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "share"),
    [(FORWARD, None), (REVERSE, None), (JSD, 0.5), (JSD, 0.1), (SKEW, 0.1)],
    ids=lambda value: getattr(value, "value", value),
)
def test_kl_div(kind: DivergenceKind, share: float | None, temperature: float) -> None:
    p = _means(1)
    divergence = Divergence(kind, temperature, parameter=share)

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        log_p_s = F.log_softmax(hidden @ weight.T / temperature, dim=1)
        log_p_t = F.log_softmax(p.teacher_hidden @ p.teacher_weight.T / temperature, dim=1)
        return (p.token_weights * _torch_divergence(log_p_t, log_p_s, divergence)).sum()

    _check(p, theirs, divergence)


@pytest.mark.parametrize(
    "fused",
    [
        pytest.param(False, id="cross_entropy"),
        pytest.param(True, id="linear_cross_entropy", marks=needs_linear_cross_entropy),
    ],
)
def test_cross_entropy_with_soft_targets(fused: bool) -> None:
    """Its gradient is that of forward KL; its value is larger by the teacher's entropy, which no student changes."""
    p = _means(2)
    p_t = (p.teacher_hidden @ p.teacher_weight.T).softmax(dim=1)
    entropy: Tensor = (p.token_weights * torch.special.entr(p_t).sum(dim=1)).sum()

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        if fused:
            ce_N = F.linear_cross_entropy(hidden, weight, p_t, reduction="none")
        else:
            ce_N = F.cross_entropy(hidden @ weight.T, p_t, reduction="none")
        return (p.token_weights * ce_N).sum() - entropy

    _check(p, theirs, Divergence())


@needs_linear_cross_entropy
@pytest.mark.parametrize("chunk", [None, 4])
def test_linear_cross_entropy_with_labels(chunk: int | None) -> None:
    """The chunked one is for labels alone: with soft targets torch sets `options` aside."""
    from torch.nn import LinearCrossEntropyOptions

    p = _means(3)
    options = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk) if chunk else None

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = F.linear_cross_entropy(hidden, weight, p.labels, options=options)
        return loss

    _check(p, theirs, None)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ligers_jsd(beta: float, temperature: float) -> None:
    """Liger's β is ours: the teacher's share of M, and 0 and 1 are forward and reverse KL.

    It averages over the labelled tokens, in chunks of 5 here. It has no T². Its value adds up in float32, whatever the
    inputs are; its gradients do not.
    """
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason=NOT_INSTALLED)
    p = _means(4)
    jsd = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=temperature,
        ignore_index=IGNORED_LABEL,
        compiled=False,
        chunk_size=5,
    )

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = jsd(hidden, weight, p.teacher_hidden, p.teacher_weight, p.labels)
        return loss

    _check(p, theirs, Divergence(JSD, temperature, parameter=beta), value_tolerance=ROUNDED)


def test_ligers_mix_with_labels() -> None:
    """Liger too takes the label's cross-entropy at temperature 1. It makes that one in float32."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason=NOT_INSTALLED)
    p = _means(5)
    mixed = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, temperature=2.0, compiled=False, chunk_size=5
    )

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = mixed(hidden, weight, p.teacher_hidden, p.teacher_weight, p.labels)
        return loss

    _check(
        p,
        theirs,
        Divergence(JSD, 2.0, parameter=0.5, kd_weight=0.7, ce_weight=0.3),
        value_tolerance=ROUNDED,
        gradient_tolerance=ROUNDED,
    )
