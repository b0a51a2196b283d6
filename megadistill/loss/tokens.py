"""The loss token by token: what an evaluation asks of each position. It knows no gradient and adds nothing up.

Legend: N this rank's tokens; D student width, E teacher width; g ranks of the vocab group; k tokens that each of them
gives to a chunk; w this rank's rows of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_reduce_sum, group_rank, group_size
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.buffers import LOGIT_MEMORY
from megadistill.loss.chunk import Chunk
from megadistill.loss.divergence import Divergence, Elementwise
from megadistill.loss.heads import Head
from megadistill.loss.inputs import Problem, agree
from megadistill.loss.passes import Everyone, walk
from megadistill.types import LogitTransform


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


@dataclass(frozen=True)
class TokenTerms:
    """What a student says of each of N tokens, at temperature 1: [N] each, in nats."""

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
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    vocab: VocabSlice,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    student_logits: LogitTransform = LogitTransform(),
    teacher_logits: LogitTransform = LogitTransform(),
    logit_memory: int = LOGIT_MEMORY,
) -> TokenTerms:
    """The terms of `distill_loss` of each token by itself, or of `label_loss` where there is no teacher.

    Collective over `vocab.group`, as they are, and no more than `logit_memory` bytes of logits exist at a time.

    Args:
        student_hidden, student_weight: [N, D] and [w, D], as in `distill_loss`.
        labels: [N] int64 global ids, or `IGNORED_LABEL`.
        teacher_hidden, teacher_weight: [N, E] and [w', E], both or none.

    Returns:
        `TokenTerms` in float32 (float64 for float64).

    Raises:
        ValueError: as in `distill_loss`.
    """
    heads = [Head("student", student_hidden, student_weight, None, student_logits)]
    if teacher_hidden is not None and teacher_weight is not None:
        heads.append(Head("teacher", teacher_hidden, teacher_weight, None, teacher_logits))
    ones_N = torch.ones_like(labels, dtype=torch.float32)
    problem = Problem(tuple(heads), labels, ones_N, Divergence(), vocab, logit_memory, Elementwise.EAGER)
    plan = agree(problem, with_gradient=False)
    everyone = Everyone.gather(problem, plan)
    g, rank = group_size(vocab.group), group_rank(vocab.group)
    found = []
    for begun in walk(problem, plan, everyone):
        chunk = begun.chunk(problem)
        k = len(chunk.tokens.weights_n) // g
        found.append(_columns(chunk)[:, rank * k : (rank + 1) * k])
    columns = torch.cat(found, dim=1) if found else everyone.weights_gL.new_empty(4 * len(heads), 0)
    cross_entropy, entropy, confidence, best, *against = columns[:, : len(labels)].unbind()
    correct = (best == labels).to(best.dtype)
    return TokenTerms(cross_entropy, entropy, confidence, correct, AgainstTeacher(*against) if against else None)


def _columns(chunk: Chunk) -> Tensor:
    """[4 or 8, n]: cross-entropy, entropy, confidence, most likely id, then `AgainstTeacher`. Collective."""
    student, teacher, labelled_n = chunk.student, chunk.teacher, chunk.tokens.labelled_n
    cross_entropy_n = torch.where(labelled_n > 0, student.label_ce_n, 0)
    own = torch.stack([cross_entropy_n, student.entropy_n, (-student.log_sum_n).exp(), student.best_n])
    if teacher is None:
        return own
    kl_n, _, jsd_n, acceptance_n = all_reduce_sum(chunk.diagnose(), chunk.vocab.group).unbind(dim=1)
    same_n = (teacher.best_n == student.best_n).to(labelled_n.dtype)
    return torch.cat([own, torch.stack([kl_n, jsd_n, acceptance_n, same_n])])
