"""The definitions, dense and in plain torch, on one process with the whole vocabulary: the oracle of the operator.

Dtypes are preserved (float64 in, float64 out) and autograd computes the gradients, so nothing here is clever. The
`[N, V]` logits of both models are in memory.

Legend: N tokens, V rows of the heads (padding included), U ≤ V the true vocabulary, K sparse target ids of a token, M
draws.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from megadistill.divergence import Divergence, DivergenceKind
from megadistill.loss.heads import Head
from megadistill.loss.sparse.distinct import gumbel_noise, keys
from megadistill.loss.sparse.selection import Sampled, SampledDistinct, Selection, Threshold, TopK
from megadistill.types import DECILES, IGNORED_LABEL, METRIC_NAMES, TOP_K, Diagnostics, LossTerms, SparseTargets, Tail


def distill_loss(
    student: Head,
    teacher: Head,
    labels: Tensor,
    *,
    token_weights: Tensor,
    divergence: Divergence,
    vocab_size: int,
    diagnostics: bool = False,
) -> LossTerms:
    """`divergence` of student against teacher, summed over the tokens, each times its weight.

    Args:
        student: hidden [N, D], weight [V, D]. Rows from `vocab_size` on are padding, which no softmax sees.
        teacher: hidden [N, E], weight [V', E]; its padding may be another. No gradient flows to it. A bias of -inf
            marks an id that it does not know.
        labels: [N] int64; `IGNORED_LABEL` where there is none: such a token has no cross-entropy term, student's or
            teacher's, and its other terms count.
        token_weights: [N]. A token of weight 0 contributes nothing: none of its values is read.
        divergence: the terms of the loss and their weights.
        vocab_size: U, the number of true ids.
        diagnostics: whether `LossTerms.diagnostics` is computed.

    Returns:
        `LossTerms` in nats; cross-entropies, entropies, agreement and log Z at temperature 1.
    """
    live = token_weights != 0
    weights_N, T = token_weights[live].to(student.hidden.dtype), divergence.temperature
    logits_NU = logits(student, vocab_size, live)
    teacher_NU = logits(teacher, vocab_size, live).detach()
    log_p_t, log_p_s = (teacher_NU / T).log_softmax(dim=1), (logits_NU / T).log_softmax(dim=1)
    value_N, kl_N = divergence_value(log_p_t, log_p_s, divergence), kl(log_p_t, log_p_s)
    terms = _terms(logits_NU, labels[live], weights_N, value_N, kl_N, divergence, teacher_NU)
    if diagnostics:
        terms = replace(terms, diagnostics=_diagnostics(teacher_NU, logits_NU.detach(), weights_N))
    return terms


def label_loss(
    student: Head, labels: Tensor, *, token_weights: Tensor, vocab_size: int, z_loss: float = 0.0
) -> LossTerms:
    """Cross-entropy against the labels plus `z_loss · (ln Z)²`: `distill_loss` without a teacher (its terms are 0)."""
    live = token_weights != 0
    weights_N = token_weights[live].to(student.hidden.dtype)
    divergence = Divergence(kd_weight=0.0, ce_weight=1.0, z_loss=z_loss)
    logits_NU = logits(student, vocab_size, live)
    none_N = torch.zeros_like(weights_N)
    return _terms(logits_NU, labels[live], weights_N, none_N, none_N, divergence)


def sparse_distill_loss(
    student: Head,
    targets: SparseTargets,
    labels: Tensor,
    *,
    token_weights: Tensor,
    divergence: Divergence,
    vocab_size: int,
) -> LossTerms:
    """Forward KL against a part of the teacher's distribution: Σ over the target ids q (ln q - ln p_s), and for
    `Tail.OTHER` the same for one event, "any other id". The other terms are those of `distill_loss`.

    With `Tail.DROPPED` the sum is of a measure that is smaller than 1, and may be negative.

    Raises:
        ValueError: another divergence than forward KL, or another temperature than the targets'.
    """
    require_sparse(divergence, targets)
    live = token_weights != 0
    logits_NU = logits(student, vocab_size, live)
    ids_NK, q_NK = targets.ids[live], targets.probs[live].to(logits_NU.dtype)
    log_p_s = (logits_NU / divergence.temperature).log_softmax(dim=1)
    log_p_NK = log_p_s.gather(1, ids_NK.clamp_min(0))
    value_N = torch.where((ids_NK >= 0) & (q_NK > 0), q_NK * (q_NK.log() - log_p_NK), 0).sum(dim=1)
    if targets.tail is Tail.OTHER:
        log_r_t = targets.log_tail[live].to(logits_NU.dtype)
        inside_NU = torch.zeros_like(log_p_s).scatter_add(1, ids_NK.clamp_min(0), (ids_NK >= 0).to(log_p_s.dtype)) > 0
        # Where no id is left outside, the tail holds nothing; a number makes the gradient of what is not used finite.
        outside_NU = torch.where((log_r_t == -math.inf).unsqueeze(1), False, ~inside_NU)
        log_r_s = torch.where(
            outside_NU.any(dim=1), log_p_s.masked_fill(~outside_NU, torch.finfo(log_p_s.dtype).min).logsumexp(dim=1), 0
        )
        value_N = value_N + torch.where(log_r_t > -math.inf, log_r_t.exp() * (log_r_t - log_r_s), 0)
    none_N = torch.zeros_like(value_N)
    return _terms(logits_NU, labels[live], token_weights[live].to(logits_NU.dtype), value_N, none_N, divergence)


def require_sparse(divergence: Divergence, targets: SparseTargets) -> None:
    """Checks that the divergence can be computed from sparse targets.

    Raises:
        ValueError: see `sparse_distill_loss`.
    """
    if divergence.formula is not DivergenceKind.FORWARD_KL:
        raise ValueError(f"{divergence.kind} needs the teacher's whole distribution; sparse targets have forward KL")
    if divergence.label_fraction > 0:
        raise ValueError("label_fraction needs the teacher's entropy, which sparse targets do not hold")
    if divergence.temperature != targets.temperature:
        raise ValueError(
            f"the targets were made at temperature {targets.temperature}, the loss is at {divergence.temperature}: "
            "make them again, or set the loss's temperature to theirs"
        )


def logits(head: Head, vocab_size: int, rows: Tensor | slice = slice(None)) -> Tensor:
    """[N, U]: the logits that the softmax reads, of the tokens `rows`."""
    transform, bias_U = head.transform, None if head.bias is None else head.bias[:vocab_size]
    raw_NU = head.hidden[rows] @ head.weight[:vocab_size].T
    if bias_U is not None:
        raw_NU = raw_NU + bias_U
    scaled_NU = raw_NU * transform.scale
    if transform.softcap is None:
        return scaled_NU
    capped_NU = transform.softcap * torch.tanh(scaled_NU / transform.softcap)
    return capped_NU if bias_U is None else capped_NU.masked_fill(bias_U == -math.inf, -math.inf)


def divergence_value(log_p_t: Tensor, log_p_s: Tensor, divergence: Divergence) -> Tensor:
    """[N]: the divergence of the log-probabilities [N, U] of teacher and student."""
    kind, share = divergence.formula, divergence.share
    if kind is DivergenceKind.FORWARD_KL:
        return kl(log_p_t, log_p_s)
    if kind is DivergenceKind.REVERSE_KL:
        return kl(log_p_s, log_p_t)
    if kind is DivergenceKind.TVD:
        return 0.5 * (log_p_t.exp() - log_p_s.exp()).abs().sum(dim=1)
    log_m = torch.logaddexp(log_p_t + math.log(share), log_p_s + math.log(1 - share))
    if kind is DivergenceKind.SKEW_KL:
        return kl(log_p_t, log_m)
    if kind is DivergenceKind.JSD:
        return share * kl(log_p_t, log_m) + (1 - share) * kl(log_p_s, log_m)
    raise NotImplementedError(f"no definition of the divergence {kind}")


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[N]: KL(p ‖ q) = Σ p (ln p - ln q); a term with p = 0 is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(dim=1)


def entropy(logits_NU: Tensor) -> Tensor:
    """[N]: -Σ p ln p."""
    entropy_N: Tensor = torch.special.entr(logits_NU.softmax(dim=1)).sum(dim=1)
    return entropy_N


def label_ce(logits_NU: Tensor, labels_N: Tensor) -> Tensor:
    """[N]: -ln p[label], 0 where there is no label."""
    has_label_N = labels_N != IGNORED_LABEL
    picked_N1 = logits_NU.log_softmax(dim=1).gather(1, (labels_N * has_label_N).unsqueeze(1))
    return torch.where(has_label_N, -picked_N1.squeeze(1), 0)


def _lowest_entropy(entropy_N: Tensor, labels_N: Tensor, fraction: float) -> Tensor:
    """[N] bool: the fraction (rounded down) of the labelled tokens with the lowest entropy; of equals the first."""
    labelled_N = labels_N != IGNORED_LABEL
    count = math.floor(fraction * int(labelled_N.sum()))
    order_N = torch.where(labelled_N, entropy_N, math.inf).argsort(stable=True)
    return torch.zeros_like(labelled_N).index_fill(0, order_N[:count], True)


def _terms(
    logits_NU: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    value_N: Tensor,
    kl_N: Tensor,
    divergence: Divergence,
    teacher_NU: Tensor | None = None,
) -> LossTerms:
    """The terms for a divergence `value_N`; those of the teacher are 0 without its logits."""
    none_N = torch.zeros_like(weights_N)
    teacher_ce_N = none_N if teacher_NU is None else label_ce(teacher_NU, labels_N)
    entropy_N = none_N if teacher_NU is None else entropy(teacher_NU)
    agrees_N = none_N if teacher_NU is None else (logits_NU.argmax(dim=1) == teacher_NU.argmax(dim=1)).to(none_N.dtype)
    use_label_N = _lowest_entropy(entropy_N, labels_N, divergence.label_fraction)
    ce_N, log_z_N = label_ce(logits_NU, labels_N), logits_NU.logsumexp(dim=1)
    kd_N = torch.where(use_label_N, divergence.kd_weight * ce_N, divergence.kd_factor * value_N)
    loss_N = kd_N + divergence.ce_weight * ce_N + divergence.z_loss * log_z_N.square()
    terms = (loss_N, value_N, kl_N, ce_N, teacher_ce_N, entropy(logits_NU), entropy_N, agrees_N, log_z_N)
    loss, *metrics = ((weights_N * term_N).sum() for term_N in terms)
    scalars = dict(zip(METRIC_NAMES, (loss, *(metric.detach() for metric in metrics)), strict=True))
    return LossTerms(**scalars, diagnostics=None)


def _diagnostics(teacher_NU: Tensor, student_NU: Tensor, weights_N: Tensor) -> Diagnostics:
    log_p_t, log_p_s = teacher_NU.log_softmax(dim=1), student_NU.log_softmax(dim=1)
    N, U = teacher_NU.shape
    sorted_NU = log_p_t.exp().sort(dim=1, descending=True).values
    place_N = torch.empty(N, dtype=torch.int64).scatter_(0, entropy(teacher_NU).argsort(stable=True), torch.arange(N))
    decile_N = place_N * DECILES // max(1, N)
    return Diagnostics(
        acceptance=(weights_N * torch.minimum(log_p_t.exp(), log_p_s.exp()).sum(dim=1)).sum(),
        reverse_kl=(weights_N * kl(log_p_s, log_p_t)).sum(),
        jsd=(weights_N * divergence_value(log_p_t, log_p_s, Divergence(DivergenceKind.JSD))).sum(),
        top_k_mass=torch.stack([(weights_N * sorted_NU[:, : min(k, U)].sum(dim=1)).sum() for k in TOP_K]),
        kl_by_entropy_decile=weights_N.new_zeros(DECILES).index_add_(
            0, decile_N.to(weights_N.device), weights_N * kl(log_p_t, log_p_s)
        ),
    )


def sparse_targets(
    teacher: Head,
    *,
    selection: Selection,
    tail: Tail,
    vocab_size: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
) -> SparseTargets:
    """A part of the teacher's distribution; see `loss.sparse.sparse_targets` for the arguments."""
    log_p = (logits(teacher, vocab_size) / temperature).log_softmax(dim=1)
    p = log_p.exp()
    order_NU = log_p.argsort(dim=1, descending=True, stable=True)
    sorted_NU = p.gather(1, order_NU)
    if isinstance(selection, Sampled):
        assert uniforms is not None
        drawn_NM = (p.cumsum(dim=1).unsqueeze(2) <= uniforms.unsqueeze(1)).sum(dim=1).clamp_max(vocab_size - 1)
        counts_NU = torch.zeros_like(p).scatter_add(1, drawn_NM, torch.ones_like(uniforms, dtype=p.dtype))
        selected_NU, target_NU = counts_NU > 0, counts_NU / selection.draws
        order_NU = torch.arange(vocab_size).expand_as(order_NU)
    elif isinstance(selection, SampledDistinct):
        assert uniforms is not None
        perturbed_NU = log_p + gumbel_noise(keys(uniforms), torch.arange(vocab_size))
        drawn_NK = perturbed_NU.argsort(dim=1, descending=True)[:, : selection.k]
        selected_NU = torch.zeros_like(p, dtype=torch.bool).scatter(1, drawn_NK, value=True) & (log_p > -math.inf)
        target_NU = torch.where(selected_NU, log_p, -math.inf).softmax(dim=1)
        order_NU = torch.arange(vocab_size).expand_as(order_NU)
    else:
        place_NU = torch.arange(vocab_size).expand_as(sorted_NU)
        if isinstance(selection, TopK):
            first_NU = place_NU < selection.k
        elif isinstance(selection, Threshold):
            first_NU = (sorted_NU >= selection.epsilon) | ((place_NU == 0) & (tail is Tail.RENORMALISED))
        else:
            before_NU = sorted_NU.cumsum(dim=1).roll(1, dims=1).index_fill(1, torch.tensor([0]), 0)
            first_NU = (before_NU < selection.p) & (place_NU < selection.max_ids)
        selected_NU = torch.zeros_like(first_NU).scatter(1, order_NU, first_NU) & (log_p > -math.inf)
        target_NU = torch.where(selected_NU, log_p, -math.inf).softmax(dim=1) if tail is Tail.RENORMALISED else p

    # The selected ids of a row, in order, then -1.
    first_NK = selected_NU.gather(1, order_NU).argsort(dim=1, descending=True, stable=True)
    first_NK = first_NK[:, : int(selected_NU.sum(dim=1).amax()) if len(p) else 0]
    ids_NK = order_NU.gather(1, first_NK)
    none_NK = ~selected_NU.gather(1, ids_NK)
    outside_N = torch.where(selected_NU, -math.inf, log_p).logsumexp(dim=1)
    return SparseTargets(
        ids=ids_NK.masked_fill(none_NK, -1),
        probs=target_NU.gather(1, ids_NK).masked_fill(none_NK, 0),
        log_tail=torch.full_like(outside_N, -math.inf) if tail is Tail.RENORMALISED else outside_N,
        tail=tail,
        temperature=temperature,
    )
