"""Between the products: what is done to every logit, as functions of a block of rows. It knows no ranks and no heads.

Each function reads a block once or twice, row by row; run as it is, it is torch's own operations, and `compiled` makes
one fused kernel of it. The mathematics is docs/loss.md's. A student's logit is finite; a teacher's may be -inf, for an
id that it does not know.

Legend: b rows (tokens) of a block, v true rows of this rank's slice of the vocabulary; T the temperature; z logits; y
logits less the maximum of the row over the whole vocabulary; a = Σ e^(y/T) over the whole vocabulary; p_t, p_s the
teacher's and student's distributions at T, d = ln p_t - ln p_s; M the mixture of both, β the teacher's share of it;
"slope": the derivative of the loss by the student's products (before bias, scale and softcap).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megadistill.loss.divergence import DivergenceKind

FARTHEST = 1000.0
"""Beyond this |d| the smaller of p_t and p_s is 0 in float64 too, so a bound on d changes no finite term."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as fused kernels, for any number of rows and columns."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def transform_(z_bv: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None) -> None:
    """Products -> logits, in place: softcap · tanh(scale · (z + bias) / softcap); -inf where the bias is."""
    if bias_v is not None:
        z_bv.add_(bias_v)
    if scale != 1.0:
        z_bv.mul_(scale)
    if softcap is not None:
        z_bv.div_(softcap).tanh_().mul_(softcap)
        if bias_v is not None:
            z_bv.masked_fill_(bias_v == -math.inf, -math.inf)


def statistics(z_bv: Tensor, ids_v: Tensor, temperature: float) -> Tensor:
    """[b, 5]: of a slice: maximum m, its id (the lowest of equals), Σ e^(z-m), Σ e^(z-m) (z-m), Σ e^((z-m)/T).

    `ids_v` are the global ids, in the dtype of z: made here, they would cost as much as an exponential.
    """
    maximum_b = z_bv.amax(dim=1)
    best_b = torch.where(z_bv == maximum_b.unsqueeze(1), ids_v, math.inf).amin(dim=1)  # `max` would not vectorise
    # -inf is 0 times -inf in the entropy's sum; this finite number is 0 times a number.
    y_bv = (z_bv - _anchor(maximum_b).unsqueeze(1)).clamp_min(-1e30)
    e_bv = y_bv.exp()
    sum_b = e_bv.sum(dim=1)
    warm_b = sum_b if temperature == 1.0 else (y_bv / temperature).exp().sum(dim=1)
    return torch.stack([maximum_b, best_b, sum_b, (e_bv * y_bv).sum(dim=1), warm_b], dim=1)


def outside_sum(z_bv: Tensor, kept_bv: Tensor, maximum_b: Tensor, temperature: float) -> Tensor:
    """[b]: Σ e^((z-m)/T) over the ids that are not kept."""
    e_bv = ((z_bv - _anchor(maximum_b).unsqueeze(1)) / temperature).exp()
    return torch.where(kept_bv, 0, e_bv).sum(dim=1)


def log_p(z_bv: Tensor, maximum_b: Tensor, log_a_b: Tensor, temperature: float) -> Tensor:
    """[b, v]: y/T - ln a. The maximum is taken off first, so that a constant added to a row changes nothing."""
    return (z_bv - maximum_b.unsqueeze(1)) / temperature - log_a_b.unsqueeze(1)


def forward_kl(
    z_s_bv: Tensor,
    z_t_bv: Tensor,
    student_3b: Tensor,
    teacher_2b: Tensor,
    kd_b: Tensor,
    pull_b: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    with_slope: bool,
) -> Tensor:
    """[b]: the slice's share of KL(p_t ‖ p_s), in terms of which none is negative. Its slope, p_s - p_t, over z_s.

    `student_3b` is the maximum, ln a at T and ln a at 1; `teacher_2b` the first two of the teacher; `kd_b` what the
    divergence is multiplied with in the slope (the 1/T of the chain rule included), `pull_b` what p_s at temperature 1
    is (cross-entropy and z-loss).
    """
    log_p_t = log_p(z_t_bv, teacher_2b[0], teacher_2b[1], temperature)
    log_p_s = log_p(z_s_bv, student_3b[0], student_3b[1], temperature)
    p_t, p_s = log_p_t.exp(), log_p_s.exp()
    share_b = kl_terms(p_t, p_s, (log_p_t - log_p_s).clamp_min(-FARTHEST)).sum(dim=1)
    if with_slope:
        slope_bv = kd_b.unsqueeze(1) * (p_s - p_t)
        write_slope(slope_bv, z_s_bv, p_s, student_3b, pull_b, temperature, scale, softcap)
    return share_b


def centred(
    formula: DivergenceKind,
    z_s_bv: Tensor,
    z_t_bv: Tensor,
    student_3b: Tensor,
    teacher_2b: Tensor,
    share: float,
    temperature: float,
) -> Tensor:
    """[b, 3]: the slice's shares of the divergence, of KL(p_t ‖ p_s), and of Σ p_s g, on which the slope is centred.

    g is the divergence's derivative by p_s, up to a constant of the row: the slope is p_s (g - Σ p_s g).
    """
    p_t, p_s, d = _both(z_s_bv, z_t_bv, student_3b, teacher_2b, temperature)
    value_bv, g_bv = value_and_pull(formula, p_t, p_s, d, share)
    kl_bv = kl_terms(p_t, p_s, d.clamp_min(-FARTHEST))
    return torch.stack([value_bv.sum(dim=1), kl_bv.sum(dim=1), (p_s * g_bv).sum(dim=1)], dim=1)


def centred_slope(
    formula: DivergenceKind,
    z_s_bv: Tensor,
    z_t_bv: Tensor,
    student_3b: Tensor,
    teacher_2b: Tensor,
    centre_b: Tensor,
    kd_b: Tensor,
    pull_b: Tensor | None,
    share: float,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> None:
    """Writes kd · p_s (g - Σ p_s g) over z_s; see `centred` and `forward_kl`."""
    p_t, p_s, d = _both(z_s_bv, z_t_bv, student_3b, teacher_2b, temperature)
    _, g_bv = value_and_pull(formula, p_t, p_s, d, share)
    slope_bv = kd_b.unsqueeze(1) * p_s * (g_bv - centre_b.unsqueeze(1))
    write_slope(slope_bv, z_s_bv, p_s, student_3b, pull_b, temperature, scale, softcap)


def student_slope(
    z_s_bv: Tensor,
    student_3b: Tensor,
    kd_b: Tensor,
    pull_b: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> None:
    """Writes kd · p_s over z_s: what every id has of the slope, with sparse targets or (kd = 0) with labels alone."""
    p_s = log_p(z_s_bv, student_3b[0], student_3b[1], temperature).exp()
    write_slope(kd_b.unsqueeze(1) * p_s, z_s_bv, p_s, student_3b, pull_b, temperature, scale, softcap)


def write_slope(
    slope_bv: Tensor,
    z_s_bv: Tensor,
    p_s: Tensor,
    student_3b: Tensor,
    pull_b: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> None:
    """Adds what cross-entropy and z-loss pull at every id, goes back through softcap and scale, and overwrites z_s."""
    if pull_b is not None:
        p_1 = p_s if temperature == 1.0 else log_p(z_s_bv, student_3b[0], student_3b[2], 1.0).exp()
        slope_bv = slope_bv + pull_b.unsqueeze(1) * p_1
    z_s_bv.copy_(slope_bv * chain(z_s_bv, scale, softcap))


def chain(z: Tensor, scale: float, softcap: float | None) -> Tensor | float:
    """The derivative of a logit by its product: scale · (1 - (z/c)²)."""
    return scale if softcap is None else scale * (1 - (z / softcap).square())


def value_and_pull(formula: DivergenceKind, p_t: Tensor, p_s: Tensor, d: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """[b, v]: the divergence's terms, and g, its derivative by p_s up to a constant of the row.

    A mixture's logarithm is taken from `expm1(-|d|)`, so that nothing cancels where student and teacher are close:
    M/p_t = 1 + (1-β)(e^-d - 1) for d > 0, M/p_s = 1 + β (e^d - 1) else.
    """
    if formula is DivergenceKind.REVERSE_KL:
        return kl_terms(p_s, p_t, -d), -d
    if formula is DivergenceKind.TVD:
        return 0.5 * (p_s - p_t).abs(), -0.5 * d.sign()
    d = d.clamp(-FARTHEST, FARTHEST)
    teacher_more = d > 0
    e = torch.expm1(-d.abs())
    nearer = torch.log1p(torch.where(teacher_more, (1 - share) * e, share * e))
    log_m_over_t = torch.where(teacher_more, nearer, nearer - d)
    if formula is DivergenceKind.SKEW_KL:
        difference = torch.where(teacher_more, p_t, -p_s) * e  # p_s - p_t
        value = (1 - share) * difference - p_t * log_m_over_t
        return value, (share - 1) * torch.expm1(-log_m_over_t)  # g + (1-α)
    log_m_over_s = torch.where(teacher_more, nearer + d, nearer)
    value = -share * p_t * log_m_over_t - (1 - share) * p_s * log_m_over_s
    return value, (share - 1) * log_m_over_s


def diagnostics(z_s_bv: Tensor, z_t_bv: Tensor, student_2b: Tensor, teacher_2b: Tensor) -> Tensor:
    """[b, 4]: the slice's shares of KL(p_t ‖ p_s), KL(p_s ‖ p_t), JSD(½) and Σ min(p_t, p_s), at temperature 1."""
    p_t, p_s, d = _both(z_s_bv, z_t_bv, student_2b, teacher_2b, 1.0)
    jsd_bv, _ = value_and_pull(DivergenceKind.JSD, p_t, p_s, d, 0.5)
    terms = [
        kl_terms(p_t, p_s, d.clamp_min(-FARTHEST)),
        kl_terms(p_s, p_t, -d),
        jsd_bv,
        torch.minimum(p_t, p_s),
    ]
    return torch.stack([term.sum(dim=1) for term in terms], dim=1)


def _both(
    z_s_bv: Tensor, z_t_bv: Tensor, student_b: Tensor, teacher_b: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_p_t = log_p(z_t_bv, teacher_b[0], teacher_b[1], temperature)
    log_p_s = log_p(z_s_bv, student_b[0], student_b[1], temperature)
    return log_p_t.exp(), log_p_s.exp(), log_p_t - log_p_s


def kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p (d + e^-d - 1) with d = ln p - ln q: over the whole vocabulary that adds Σ q - Σ p = 0 to Σ p d.

    But no term is negative, and nothing cancels when p and q are close. Where q is far likelier, e^-d would overflow,
    and the plain sum is exact enough.
    """
    return torch.where(d > -1, p * (d + torch.expm1(-d)), p * d + (q - p))


def _anchor(maximum_b: Tensor) -> Tensor:
    """The maximum, and a finite number where a slice has none (every id of it unknown to the teacher)."""
    return maximum_b.clamp_min(torch.finfo(maximum_b.dtype).min)
