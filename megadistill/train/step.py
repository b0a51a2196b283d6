"""One optimizer step: accumulate, check, move. It knows no files.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.comm.collectives import all_reduce_sum
from megadistill.comm.topology import Topology
from megadistill.config import LossSection
from megadistill.loss import Divergence, DivergenceKind, distill_loss, label_loss
from megadistill.records import IGNORED_LABEL, METRIC_NAMES, LossTerms, TokenBatch
from megadistill.student.engine import StudentEngine
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.train.health import require_finite


@dataclass(frozen=True)
class Teacher:
    """The frozen side of the loss: the pipeline, and the head's rows of this rank's slice of the vocabulary [v, E]."""

    pipeline: TeacherPipeline
    head: Tensor


@dataclass(frozen=True)
class StepOutcome:
    """What a step computed: means over the tokens of all ranks, by `METRIC_NAMES`."""

    metrics: dict[str, float]
    grad_norm: float
    teacher_seconds: float


def train_step(
    student: StudentEngine,
    teacher: Teacher | None,
    batch: TokenBatch,
    *,
    step: int,
    micro_batch: int,
    learning_rate: float,
    loss: LossSection,
    topology: Topology,
) -> StepOutcome:
    """Accumulates over this rank's rows in micro-batches and takes one optimizer step. Collective over the world.

    The division by the global token count stands here, and nowhere else: it is in the tokens' weights. Besides the
    metrics and the gradient norm, the host waits for the device in each micro-batch, where the ranks of the loss agree
    on their token counts and where the teacher's digests are compared.

    Raises:
        OperatorFault: a number is not finite; the optimizer has not moved.
        SignalMismatch: the teacher answered another batch.
    """
    count = torch.tensor(batch.valid_tokens, dtype=torch.float64, device=topology.device)
    count = all_reduce_sum(count, topology.world_group).clamp_(min=1.0)
    totals = torch.zeros(len(METRIC_NAMES), dtype=torch.float64, device=topology.device)
    teacher_seconds = 0.0
    grad_norm: float | None = None
    micro_batches = batch.micro_batches(micro_batch)
    for index, micro in enumerate(micro_batches):
        on_device = micro.to(topology.device)
        teacher_hidden = None
        if teacher is not None:
            began = time.perf_counter()
            teacher_hidden = teacher.pipeline.signal(on_device).hidden_for(on_device)
            teacher_seconds += time.perf_counter() - began
        terms = _loss(student, teacher, teacher_hidden, on_device, count, loss)
        totals += terms.metrics()
        if index == len(micro_batches) - 1:
            all_reduce_sum(totals, topology.world_group)
            metrics = dict(zip(METRIC_NAMES, totals.tolist(), strict=True))  # a device sync, one a step
            require_finite(step, metrics)
        student.backward(terms.loss)
        grad_norm = student.step(learning_rate)
    assert grad_norm is not None, "the last micro-batch ends the accumulation window"
    require_finite(step, {"grad_norm": grad_norm})
    return StepOutcome(metrics=metrics, grad_norm=grad_norm, teacher_seconds=teacher_seconds)


def _loss(
    student: StudentEngine,
    teacher: Teacher | None,
    teacher_hidden: Tensor | None,
    batch: TokenBatch,
    count: Tensor,
    loss: LossSection,
) -> LossTerms:
    labels = batch.labels.flatten()
    weights = (labels != IGNORED_LABEL).to(torch.float32).div_(count.to(torch.float32))
    hidden = student.hidden(batch.tokens)
    if teacher is None or teacher_hidden is None:
        return label_loss(
            hidden,
            student.head.weight(),
            labels,
            token_weights=weights,
            vocab=student.head.vocab,
            z_loss=loss.z_loss,
            chunk_tokens=loss.chunk_tokens,
        )
    return distill_loss(
        hidden,
        student.head.weight(),
        teacher_hidden,
        teacher.head,
        labels,
        token_weights=weights,
        divergence=divergence(loss),
        vocab=student.head.vocab,
        chunk_tokens=loss.chunk_tokens,
    )


def divergence(loss: LossSection) -> Divergence:
    """The recipe's loss section as the loss room's own value."""
    return Divergence(
        kind=DivergenceKind(loss.divergence),
        temperature=loss.temperature,
        temperature_squared=loss.temperature_squared,
        kd_weight=loss.kd_weight,
        ce_weight=loss.ce_weight,
        z_loss=loss.z_loss,
    )
