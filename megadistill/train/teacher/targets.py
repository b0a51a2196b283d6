"""The supervision of a micro-batch: the target of its tokens, and the student's loss against it.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S, D student width, E teacher width, v rows of a
vocabulary slice.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import Divergence, Head, LossOptions, distill_loss, label_loss, sparse_distill_loss
from megadistill.train.objective import Objective
from megadistill.types import LossTerms, SparseTargets, TokenBatch


@dataclass(frozen=True)
class StudentOutput:
    """The student's part of a loss: one micro-batch of this rank."""

    head: Head
    """Hidden states [N, D] after the last norm, and this rank's rows of the LM head [v, D]."""
    labels: Tensor
    """[N] int64"""
    token_weights: Tensor
    """[N] float32: 1 / valid tokens of the global batch; 0 where there is no label."""
    vocab: VocabSlice
    objective: Objective
    divergence: Divergence
    """The objective's at this step."""
    options: LossOptions
    """How the loss is computed."""


class Target(Protocol):
    """Supervision of a micro-batch's N tokens."""

    def loss(self, student: StudentOutput) -> LossTerms:
        """The student's loss against this target. Collective over the vocab group."""

    def complete(self) -> Head | None:
        """The teacher's complete distribution: hidden states [N, E] and this rank's rows of its head; None: unknown."""


class TargetedBatch(NamedTuple):
    """A micro-batch and its target."""

    batch: TokenBatch
    """Tensors on the host."""
    target: Target


@dataclass(frozen=True)
class LabelTarget:
    """No teacher: the next token."""

    def loss(self, student: StudentOutput) -> LossTerms:
        return label_loss(
            student.head,
            student.labels,
            token_weights=student.token_weights,
            vocab=student.vocab,
            z_loss=student.divergence.z_loss,
            options=student.options,
        )

    def complete(self) -> Head | None:
        return None


@dataclass(frozen=True)
class HiddenTarget:
    """A whole distribution: final hidden states, and the head that makes logits of them."""

    teacher: Head
    """Hidden states [N, E], and this rank's rows of the LM head [v, E]."""

    def loss(self, student: StudentOutput) -> LossTerms:
        return distill_loss(
            student.head,
            self.teacher,
            student.labels,
            token_weights=student.token_weights,
            divergence=student.divergence,
            vocab=student.vocab,
            options=student.options,
        )

    def complete(self) -> Head | None:
        return self.teacher


@dataclass(frozen=True)
class SparseTarget:
    """A truncated distribution."""

    targets: SparseTargets

    def loss(self, student: StudentOutput) -> LossTerms:
        return sparse_distill_loss(
            student.head,
            self.targets,
            student.labels,
            token_weights=student.token_weights,
            divergence=student.divergence,
            vocab=student.vocab,
            options=student.options,
        )

    def complete(self) -> Head | None:
        return None
