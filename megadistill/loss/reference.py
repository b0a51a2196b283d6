"""The definitions, dense and in plain torch: the oracle of the operator. It knows one process and the whole vocabulary.

Every dtype is kept (float64 in, float64 out) and autograd finds the gradients, so nothing here is clever. It builds
the `[N, V]` logits of both models.

Legend: N tokens, D student width, E teacher width, V rows of the heads (padding included), U ≤ V the true vocabulary.
"""

import torch
from torch import Tensor

from megadistill.loss.divergence import Divergence
from megadistill.records import IGNORED_LABEL, LossTerms


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    divergence: Divergence,
    vocab_size: int,
) -> LossTerms:
    """`divergence` of student against teacher, summed over the tokens, each times its weight.

    Args:
        student_hidden: [N, D], what the student's head reads.
        student_weight: [V, D], the student's head. Rows from `vocab_size` on are padding, which no softmax sees.
        teacher_hidden: [N, E]; no gradient flows to it, nor to `teacher_weight`.
        teacher_weight: [V, E].
        labels: [N] int64; `IGNORED_LABEL` where there is none: such a token has no cross-entropy term, student's or
            teacher's, and keeps the others.
        token_weights: [N]. A token of weight 0 is not there: nothing of it is read.
        divergence: the terms of the loss and their weights.
        vocab_size: U, the number of true ids.

    Returns:
        `LossTerms` in nats; cross-entropies, teacher entropy, agreement and log Z at temperature 1.
    """
    live = token_weights != 0
    weights_N, labels_N = token_weights[live].to(student_hidden.dtype), labels[live]
    logits_NU = student_hidden[live] @ student_weight[:vocab_size].T
    teacher_logits_NU = (teacher_hidden[live] @ teacher_weight[:vocab_size].T).detach()

    kl_N = _forward_kl(teacher_logits_NU / divergence.temperature, logits_NU / divergence.temperature)
    student_loss, student_ce, log_z = _label_terms(logits_NU, labels_N, weights_N, divergence)
    teacher_log_p_NU = teacher_logits_NU.log_softmax(dim=1)
    same_best_N = logits_NU.argmax(dim=1) == teacher_logits_NU.argmax(dim=1)
    kl = (weights_N * kl_N).sum()
    return LossTerms(
        loss=divergence.kd_factor * kl + student_loss,
        kl=kl.detach(),
        student_ce=student_ce.detach(),
        teacher_ce=(weights_N * _label_ce(teacher_logits_NU, labels_N)).sum(),
        teacher_entropy=-(weights_N * (teacher_log_p_NU.exp() * teacher_log_p_NU).sum(dim=1)).sum(),
        agreement=(weights_N * same_best_N).sum(),
        log_z=log_z.detach(),
    )


def label_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    vocab_size: int,
    z_loss: float = 0.0,
) -> LossTerms:
    """Cross-entropy against the labels plus `z_loss · (ln Z)²`: `distill_loss` without a teacher (its terms are 0)."""
    live = token_weights != 0
    logits_NU = student_hidden[live] @ student_weight[:vocab_size].T
    weights_N = token_weights[live].to(student_hidden.dtype)
    divergence = Divergence(kd_weight=0.0, ce_weight=1.0, z_loss=z_loss)
    loss, ce, log_z = _label_terms(logits_NU, labels[live], weights_N, divergence)
    zero = torch.zeros_like(ce.detach())
    return LossTerms(
        loss=loss,
        kl=zero,
        student_ce=ce.detach(),
        teacher_ce=zero,
        teacher_entropy=zero,
        agreement=zero,
        log_z=log_z.detach(),
    )


def _forward_kl(teacher_logits_NU: Tensor, student_logits_NU: Tensor) -> Tensor:
    """[N]: Σ p_t (ln p_t - ln p_s)."""
    log_p_t, log_p_s = teacher_logits_NU.log_softmax(dim=1), student_logits_NU.log_softmax(dim=1)
    return (log_p_t.exp() * (log_p_t - log_p_s)).sum(dim=1)


def _label_ce(logits_NU: Tensor, labels_N: Tensor) -> Tensor:
    """[N]: -ln p[label], 0 where there is no label."""
    has_label_N = labels_N != IGNORED_LABEL
    picked_N1 = logits_NU.log_softmax(dim=1).gather(1, (labels_N * has_label_N).unsqueeze(1))
    return -picked_N1.squeeze(1) * has_label_N


def _label_terms(
    logits_NU: Tensor, labels_N: Tensor, weights_N: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms without the teacher: their loss, the cross-entropy and log Z, summed over the tokens."""
    log_z_N = logits_NU.logsumexp(dim=1)
    ce = (weights_N * _label_ce(logits_NU, labels_N)).sum()
    z = (weights_N * log_z_N.square()).sum()
    return divergence.ce_weight * ce + divergence.z_loss * z, ce, (weights_N * log_z_N).sum()
