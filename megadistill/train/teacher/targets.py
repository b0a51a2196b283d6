"""The supervision of a micro-batch: the target of its tokens, and the student's loss against it.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S, D student width, E teacher width, v rows of a
vocabulary slice.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import Divergence, distill_loss, label_loss, sparse_distill_loss
from megadistill.train.objective import Objective
from megadistill.types import LogitTransform, LossTerms, SparseTargets, TokenBatch


@dataclass(frozen=True)
class StudentOutput:
    """The student's part of a loss: one micro-batch of this rank."""

    hidden: Tensor
    """[N, D] after the last norm."""
    weight: Tensor
    """[v, D]: this rank's rows of the head."""
    labels: Tensor
    """[N] int64"""
    token_weights: Tensor
    """[N] float32: 1 / valid tokens of the global batch; 0 where there is no label."""
    vocab: VocabSlice
    objective: Objective
    divergence: Divergence
    """The objective's at this step."""
    diagnostics: bool = False
    """Whether `LossTerms.diagnostics` are computed."""


class Target(Protocol):
    """Supervision of a micro-batch's N tokens."""

    def loss(self, student: StudentOutput) -> LossTerms:
        """The student's loss against this target. Collective over the vocab group."""


class TargetedBatch(NamedTuple):
    """A micro-batch and its target."""

    batch: TokenBatch
    """On the host."""
    target: Target


@dataclass(frozen=True)
class LabelTarget:
    """No teacher: the next token."""

    def loss(self, student: StudentOutput) -> LossTerms:
        objective = student.objective
        return label_loss(
            student.hidden,
            student.weight,
            student.labels,
            token_weights=student.token_weights,
            vocab=student.vocab,
            z_loss=objective.loss.z_loss,
            student_logits=objective.student_logits,
            logit_memory=objective.logit_memory,
            elementwise=objective.elementwise,
        )


@dataclass(frozen=True)
class HiddenTarget:
    """A whole distribution: final hidden states, and the head that makes logits of them."""

    hidden: Tensor
    """[N, E]"""
    weight: Tensor
    """[v, E]: this rank's rows of the teacher's head."""
    bias: Tensor | None = None
    """[v]"""
    logits: LogitTransform = LogitTransform()

    def loss(self, student: StudentOutput) -> LossTerms:
        objective = student.objective
        return distill_loss(
            student.hidden,
            student.weight,
            self.hidden,
            self.weight,
            student.labels,
            token_weights=student.token_weights,
            divergence=student.divergence,
            vocab=student.vocab,
            teacher_bias=self.bias,
            student_logits=objective.student_logits,
            teacher_logits=self.logits,
            logit_memory=objective.logit_memory,
            elementwise=objective.elementwise,
            diagnose=student.diagnostics,
        )


@dataclass(frozen=True)
class SparseTarget:
    """A truncated distribution."""

    targets: SparseTargets

    def loss(self, student: StudentOutput) -> LossTerms:
        objective = student.objective
        return sparse_distill_loss(
            student.hidden,
            student.weight,
            self.targets,
            student.labels,
            token_weights=student.token_weights,
            divergence=student.divergence,
            vocab=student.vocab,
            student_logits=objective.student_logits,
            logit_memory=objective.logit_memory,
            elementwise=objective.elementwise,
        )
