"""The terms of the loss token by token, for an evaluation: no gradient, no sums.

Legend: N this rank's tokens; g ranks of the vocab group; n tokens of a chunk (of the whole group).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_reduce_sum, group_rank, group_size
from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence
from megadistill.loss.chunk import Chunk
from megadistill.loss.heads import Head
from megadistill.loss.in_flight import GroupTokens, iter_chunks
from megadistill.loss.inputs import LossInputs, exchange_metadata
from megadistill.loss.options import LossOptions


@dataclass(frozen=True)
class AgainstTeacher:
    """Teacher and student on each of N tokens, at temperature 1: [N] each, in nats."""

    kl: Tensor
    """KL(p_t ‖ p_s)."""
    jsd: Tensor
    """Jensen-Shannon divergence, β = 0.5."""
    acceptance: Tensor
    """Σ min(p_t, p_s): the acceptance rate of speculative decoding, 1 - total variation."""
    agreement: Tensor
    """1 where both have the same most likely id, else 0."""
    cross_entropy: Tensor
    """-ln p_t of the label; 0 where there is none."""


@dataclass(frozen=True)
class TokenTerms:
    """A student's terms on each of N tokens, at temperature 1: [N] each, in nats."""

    cross_entropy: Tensor
    """-ln p_s of the label; 0 where there is none."""
    entropy: Tensor
    confidence: Tensor
    """The largest probability of p_s."""
    correct: Tensor
    """1 where the label has that largest probability, else 0. Of equal ids the lowest counts."""
    teacher: AgainstTeacher | None


@torch.no_grad()
def token_terms(
    student: Head,
    labels: Tensor,
    *,
    vocab: VocabSlice,
    teacher: Head | None = None,
    options: LossOptions = LossOptions(),
) -> TokenTerms:
    """The terms of `distill_loss` of each token by itself, or of `label_loss` where there is no teacher.

    Collective over `vocab.group`, as they are; arguments as there.

    Returns:
        `TokenTerms` in float32 (float64 for float64).

    Raises:
        ValueError: as in `distill_loss`.
    """
    ones_N = torch.ones_like(labels, dtype=torch.float32)
    inputs = LossInputs(student, teacher, labels, ones_N, Divergence(), vocab, options)
    plan, _ = exchange_metadata(inputs, with_gradient=False)
    tokens = GroupTokens.gather(inputs, plan)
    g, rank = group_size(vocab.group), group_rank(vocab.group)
    chunks = [_terms(in_flight.wait(inputs)).chunk(g, dim=1)[rank] for in_flight in iter_chunks(inputs, plan, tokens)]
    terms = torch.cat(chunks, dim=1) if chunks else tokens.weights_gL.new_empty(4 if teacher is None else 9, 0)
    cross_entropy, entropy, confidence, best, *against = terms[:, : len(labels)].unbind()
    correct = (best == labels).to(best.dtype)
    return TokenTerms(cross_entropy, entropy, confidence, correct, AgainstTeacher(*against) if against else None)


def _terms(chunk: Chunk) -> Tensor:
    """[4 or 9, n]: cross-entropy, entropy, confidence, most likely id, then `AgainstTeacher`. Collective."""
    student, teacher, has_label_n = chunk.student, chunk.teacher, chunk.tokens.has_label_n
    cross_entropy_n = torch.where(has_label_n > 0, student.label_ce_n, 0)
    own = torch.stack([cross_entropy_n, student.entropy_n, (-student.log_sum_n).exp(), student.argmax_n])
    if teacher is None:
        return own
    kl_n, _, jsd_n, acceptance_n = all_reduce_sum(chunk.pairwise_terms(), chunk.vocab.group).unbind(dim=1)
    same_n = (teacher.argmax_n == student.argmax_n).to(has_label_n.dtype)
    teacher_ce_n = torch.where(has_label_n > 0, teacher.label_ce_n, 0)
    return torch.cat([own, torch.stack([kl_n, jsd_n, acceptance_n, same_n, teacher_ce_n])])
