"""Elementwise arithmetic of the loss, between the matrix products: functions of a block of logit rows.

Each function reads a block once or twice, row by row; run as it is, it is torch's own operations, and `compiled` makes
one fused kernel of it. The derivation is in docs/loss.md. A student's logit is finite; a teacher's may be -inf, for an
id that it does not know.

Legend: b rows (tokens) of a block, v true rows of this rank's slice; T the temperature; z logits; y = z - max z, the
maximum being that over the whole vocabulary; p_t, p_s the teacher's and student's distributions at T, d = ln p_t -
ln p_s; M the mixture of both, β the teacher's share of it; dlogits: the derivative of the loss with respect to the
student's products x Wᵀ (before bias, scale and softcap), written in the dtype of the memory that it is written to: the
student's logits themselves, or a bf16 matrix, so that no other pass has to round it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadistill.divergence import DivergenceKind
from megadistill.loss.exponential import INDUCTOR_OPTIONS, inlined_exp, inlined_kl_terms, kl_terms
from megadistill.types import LogitTransform

MAX_LOG_RATIO = 1000.0
"""Beyond this |d| the smaller of p_t and p_s is 0 in float64 too, so a bound on d changes no finite term."""


MAX_VARIANTS = 64
"""Compiled variants of a function in a process; torch's own limit is 8."""


class SoftmaxBlock(NamedTuple):
    """A block of one model's logits on this slice, with the statistics of its softmax over the whole vocabulary."""

    z_bv: Tensor
    max_b: Tensor
    log_sum_T_b: Tensor
    """ln Σ e^(y/T)"""
    log_sum_b: Tensor
    """ln Σ e^y"""


class LabelCoefs(NamedTuple):
    """Factors of each token in the part of dlogits that cross-entropy and z-loss have."""

    p_s_b: Tensor
    """The factor of p_s at temperature 1."""
    onehot_b: Tensor
    """The label's own part."""
    row_b: Tensor
    """The label's row of this slice, -1 where another rank holds it, in the dtype of z."""
    rows_v: Tensor
    """The row of each logit of a block, in the dtype of z: made here, they would cost as much as an exponential."""


class GradCoefs(NamedTuple):
    """Factors of each token in dlogits."""

    kd_b: Tensor
    """The factor of the divergence's derivative, with the 1/T of the chain rule."""
    label: LabelCoefs | None
    """None where the loss has neither cross-entropy nor z-loss."""


class Formula(NamedTuple):
    """A divergence, its temperature, and the teacher's share β of the mixture M where it has one."""

    kind: DivergenceKind
    temperature: float
    share: float


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as fused kernels, for any number of rows and columns, temperature and softcap.

    What is compiled once more: another divergence, a temperature of 1, a term or a softcap that is there or not, and a
    single row or column. A run has one or two of these; a process that goes through all of them would reach torch's
    limit, at which a function that must be one graph fails.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    return torch.compile(function, dynamic=True, fullgraph=True, options=INDUCTOR_OPTIONS)


def apply_transform_(z_bv: Tensor, bias_v: Tensor | None, transform: LogitTransform) -> None:
    """Products -> logits, in place: softcap · tanh(scale · (z + bias) / softcap); -inf where the bias is."""
    if bias_v is not None:
        z_bv.add_(bias_v)
    if transform.scale != 1.0:
        z_bv.mul_(transform.scale)
    if transform.softcap is not None:
        z_bv.div_(transform.softcap).tanh_().mul_(transform.softcap)
        if bias_v is not None:
            z_bv.masked_fill_(bias_v == -math.inf, -math.inf)


def through_transform(dz: Tensor, z: Tensor, transform: LogitTransform) -> Tensor:
    """A derivative with respect to logits, with respect to their products: dz · scale · (1 - (z/softcap)²)."""
    if transform.scale != 1.0:
        dz = dz * transform.scale
    return dz if transform.softcap is None else dz * (1 - (z / transform.softcap).square())


def slice_stats(z_bv: Tensor, ids_v: Tensor, temperature: float) -> Tensor:
    """[b, 5]: a slice's maximum m, its id (the lowest of equals), Σ e^(z-m), Σ e^(z-m) (z-m), Σ e^((z-m)/T).

    `ids_v` are the global ids, in the dtype of z: made here, they would cost as much as an exponential.
    """
    max_b = z_bv.amax(dim=1)
    argmax_b = torch.where(z_bv == max_b.unsqueeze(1), ids_v, math.inf).amin(dim=1)  # `max` would not vectorise
    # -inf is 0 times -inf in the entropy's sum; this finite number is 0 times a number.
    y_bv = (z_bv - _finite(max_b).unsqueeze(1)).clamp_min(-1e30)
    e_bv = inlined_exp(y_bv)
    sum_b = e_bv.sum(dim=1)
    sum_T_b = sum_b if temperature == 1.0 else inlined_exp(y_bv / temperature).sum(dim=1)
    return torch.stack([max_b, argmax_b, sum_b, (e_bv * y_bv).sum(dim=1), sum_T_b], dim=1)


def tail_sum(z_bv: Tensor, in_targets_bv: Tensor, max_b: Tensor, temperature: float) -> Tensor:
    """[b]: Σ e^((z-m)/T) over the ids that are not among the sparse targets."""
    e_bv = inlined_exp((z_bv - _finite(max_b).unsqueeze(1)) / temperature)
    return torch.where(in_targets_bv, 0, e_bv).sum(dim=1)


def log_p(block: SoftmaxBlock) -> Tensor:
    """[b, v]: ln p at temperature 1. The maximum comes off first: a constant added to a row changes nothing."""
    return (block.z_bv - block.max_b.unsqueeze(1)) - block.log_sum_b.unsqueeze(1)


def log_p_T(block: SoftmaxBlock, temperature: float) -> Tensor:
    """[b, v]: ln p at temperature T."""
    y_bv = block.z_bv - block.max_b.unsqueeze(1)
    return (y_bv if temperature == 1.0 else y_bv / temperature) - block.log_sum_T_b.unsqueeze(1)


def forward_kl(
    student: SoftmaxBlock,
    teacher: SoftmaxBlock,
    temperature: float,
    coefs: GradCoefs | None,
    transform: LogitTransform,
    out_bv: Tensor | None,
) -> Tensor:
    """[b]: the slice's share of KL(p_t ‖ p_s), in terms of which none is negative.

    With `coefs` dlogits is written to `out_bv`; its divergence part is kd · (p_s - p_t).
    """
    log_p_t, log_p_s = log_p_T(teacher, temperature), log_p_T(student, temperature)
    p_t, p_s = inlined_exp(log_p_t), inlined_exp(log_p_s)
    share_b = inlined_kl_terms(p_t, p_s, (log_p_t - log_p_s).clamp_min(-MAX_LOG_RATIO)).sum(dim=1)
    if coefs is not None and out_bv is not None:
        out_bv.copy_(_dlogits(student, coefs.kd_b.unsqueeze(1) * (p_s - p_t), p_s, temperature, coefs, transform))
    return share_b


def mean_centred_stats(student: SoftmaxBlock, teacher: SoftmaxBlock, formula: Formula) -> Tensor:
    """[b, 3]: the slice's shares of the divergence, of KL(p_t ‖ p_s), and of the mean Σ p_s g.

    g is the divergence's derivative with respect to p_s, up to a constant of the row; its derivative with respect to
    the logits over T is p_s (g - Σ p_s g).
    """
    p_t, p_s, d = _distributions(student, teacher, formula.temperature)
    value_bv, g_bv = value_and_grad_p(formula, p_t, p_s, d)
    kl_bv = kl_terms(p_t, p_s, d.clamp_min(-MAX_LOG_RATIO))
    return torch.stack([value_bv.sum(dim=1), kl_bv.sum(dim=1), (p_s * g_bv).sum(dim=1)], dim=1)


def write_mean_centred_dlogits(
    student: SoftmaxBlock,
    teacher: SoftmaxBlock,
    formula: Formula,
    mean_b: Tensor,
    coefs: GradCoefs,
    transform: LogitTransform,
    out_bv: Tensor,
) -> None:
    """Writes dlogits, whose divergence part is kd · p_s (g - Σ p_s g)."""
    p_t, p_s, d = _distributions(student, teacher, formula.temperature)
    _, g_bv = value_and_grad_p(formula, p_t, p_s, d)
    dz_bv = coefs.kd_b.unsqueeze(1) * p_s * (g_bv - mean_b.unsqueeze(1))
    out_bv.copy_(_dlogits(student, dz_bv, p_s, formula.temperature, coefs, transform))


def write_student_dlogits(
    student: SoftmaxBlock, temperature: float, coefs: GradCoefs, transform: LogitTransform, out_bv: Tensor
) -> None:
    """Writes `student_dlogits`."""
    out_bv.copy_(student_dlogits(student, temperature, coefs, transform))


def student_dlogits(student: SoftmaxBlock, temperature: float, coefs: GradCoefs, transform: LogitTransform) -> Tensor:
    """[b, v]: the part of dlogits that needs no teacher, of which kd · p_s is every id's: all but sparse targets."""
    p_s = inlined_exp(log_p_T(student, temperature))
    return _dlogits(student, coefs.kd_b.unsqueeze(1) * p_s, p_s, temperature, coefs, transform)


def _dlogits(
    student: SoftmaxBlock,
    dz_bv: Tensor,
    p_s: Tensor,
    temperature: float,
    coefs: GradCoefs,
    transform: LogitTransform,
) -> Tensor:
    """[b, v]: `dz_bv` and the part of cross-entropy and z-loss, taken back through softcap and scale.

    The label's own part cancels most of what stands at the label of a good student (p_s - 1), so it is added here,
    before anything is rounded to bf16.
    """
    label = coefs.label
    if label is not None:
        dz_bv = dz_bv + label.p_s_b.unsqueeze(1) * (p_s if temperature == 1.0 else inlined_exp(log_p(student)))
    dlogits_bv = through_transform(dz_bv, student.z_bv, transform)
    if label is None:
        return dlogits_bv
    is_label_bv = label.rows_v == label.row_b.unsqueeze(1)
    return torch.where(is_label_bv, dlogits_bv + label.onehot_b.unsqueeze(1), dlogits_bv)


def value_and_grad_p(formula: Formula, p_t: Tensor, p_s: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """[b, v]: the divergence's terms, and g, their derivative with respect to p_s up to a constant of the row.

    A mixture's logarithm is taken from `expm1(-|d|)`, so that nothing cancels where student and teacher are close:
    M/p_t = 1 + (1-β)(e^-d - 1) for d > 0, M/p_s = 1 + β (e^d - 1) else.
    """
    kind, share = formula.kind, formula.share
    if kind is DivergenceKind.REVERSE_KL:
        return kl_terms(p_s, p_t, -d), -d
    if kind is DivergenceKind.TVD:
        return 0.5 * (p_s - p_t).abs(), -0.5 * d.sign()
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    teacher_more = d > 0
    e = torch.expm1(-d.abs())
    nearer = torch.log1p(torch.where(teacher_more, (1 - share) * e, share * e))
    log_m_over_t = torch.where(teacher_more, nearer, nearer - d)
    if kind is DivergenceKind.SKEW_KL:
        difference = torch.where(teacher_more, p_t, -p_s) * e  # p_s - p_t
        value = (1 - share) * difference - p_t * log_m_over_t
        return value, (share - 1) * torch.expm1(-log_m_over_t)  # g + (1-α)
    if kind is DivergenceKind.JSD:
        log_m_over_s = torch.where(teacher_more, nearer + d, nearer)
        value = -share * p_t * log_m_over_t - (1 - share) * p_s * log_m_over_s
        return value, (share - 1) * log_m_over_s
    raise NotImplementedError(f"no arithmetic for the divergence {kind}")


def pairwise_terms(student: SoftmaxBlock, teacher: SoftmaxBlock) -> Tensor:
    """[b, 4]: the slice's shares of KL(p_t ‖ p_s), KL(p_s ‖ p_t), JSD(½) and Σ min(p_t, p_s), at temperature 1."""
    log_p_t, log_p_s = log_p(teacher), log_p(student)
    p_t, p_s, d = log_p_t.exp(), log_p_s.exp(), log_p_t - log_p_s
    jsd_bv, _ = value_and_grad_p(Formula(DivergenceKind.JSD, 1.0, 0.5), p_t, p_s, d)
    terms = [
        kl_terms(p_t, p_s, d.clamp_min(-MAX_LOG_RATIO)),
        kl_terms(p_s, p_t, -d),
        jsd_bv,
        torch.minimum(p_t, p_s),
    ]
    return torch.stack([term.sum(dim=1) for term in terms], dim=1)


def _distributions(student: SoftmaxBlock, teacher: SoftmaxBlock, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """p_t, p_s and d."""
    log_p_t, log_p_s = log_p_T(teacher, temperature), log_p_T(student, temperature)
    return log_p_t.exp(), log_p_s.exp(), log_p_t - log_p_s


def _finite(max_b: Tensor) -> Tensor:
    """The maximum, and a finite number where a slice has none (the teacher knows none of its ids)."""
    return max_b.clamp_min(torch.finfo(max_b.dtype).min)
