"""One optimizer step: accumulate, check, move. It knows no files.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S.
"""

import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.collectives import all_reduce_sum, all_true
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.loss import Divergence, distill_loss, label_loss, sparse_distill_loss
from megadistill.student.engine import StudentEngine
from megadistill.train.objective import Objective
from megadistill.train.resilience.anomalies import finite, require_sound_teacher
from megadistill.train.teacher.targets import Lesson, StoredTeacher, Teacher
from megadistill.types import (
    DECILES,
    IGNORED_LABEL,
    METRIC_NAMES,
    TOP_K,
    Diagnostics,
    LossTerms,
    SparseTargets,
    TokenBatch,
)

DIAGNOSTIC_NAMES = (
    "acceptance",
    "reverse_kl",
    "jsd",
    *(f"top_{k}_mass" for k in TOP_K),
    *(f"kl_entropy_decile_{decile}" for decile in range(1, DECILES + 1)),
)


@dataclass(frozen=True)
class StepOutcome:
    """What a step computed: means over the tokens of all ranks, by `METRIC_NAMES`."""

    metrics: dict[str, float]
    grad_norm: float
    """Not finite where the step moved nothing, since a loss or a gradient was not."""
    flags: dict[str, float]
    """What the ranks told each other, summed over them."""
    teacher_seconds: float
    diagnostics: dict[str, float] | None = None
    """By `DIAGNOSTIC_NAMES`, on the steps that take the closer look, but for what is infinite: the reverse KL against a
    teacher that does not know some ids. The KL of a decile is the mean over its own tokens."""

    @property
    def skipped(self) -> bool:
        """Whether the step moved nothing: the same on every rank."""
        return not math.isfinite(self.grad_norm)


def train_step(
    student: StudentEngine,
    teacher: Teacher | StoredTeacher | None,
    lessons: Iterator[Lesson],
    *,
    step: int,
    accumulation: int,
    valid_tokens: int,
    learning_rate: float,
    objective: Objective,
    topology: Topology,
    flags: Callable[[], Mapping[str, float]] = dict,
    recompute: bool = False,
) -> StepOutcome:
    """Accumulates over the next `accumulation` lessons and takes one optimizer step. Collective over the world.

    `flags`, what this rank has to tell the others, is asked before the one reduction of the step's numbers, and rides
    on it; every rank gives the same names. `recompute`: the first micro-batch is computed twice and compared.

    A loss or a gradient that is not finite on any rank makes the step move nothing on all of them: its last gradient is
    made not finite everywhere, and DeepSpeed discards a step whose gradient norm is not.

    `valid_tokens` are those of this rank's share of the step. The division by the global token count stands here, and
    nowhere else: it is in the tokens' weights. Besides the metrics and the gradient norm, the host waits for the device
    in each micro-batch, where the ranks of the loss agree on their token counts and where the teacher's digests are
    compared.

    Raises:
        OperatorFault: the teacher's numbers are not finite, or computing twice gives two results; the optimizer has not
            moved.
        SignalMismatch, UserError, ShardFault: see `lessons`.
    """
    count = torch.tensor(valid_tokens, dtype=torch.float64, device=topology.device)
    with timeline.span(timeline.WAIT, "count tokens"):
        count = all_reduce_sum(count, topology.world_group).clamp_(min=1.0)
    diagnose = teacher is not None and objective.diagnoses(step)
    names = (*METRIC_NAMES, *DIAGNOSTIC_NAMES) if diagnose else METRIC_NAMES
    totals = torch.zeros(len(names), dtype=torch.float64, device=topology.device)
    loss = _Loss(student, teacher, objective, objective.divergence(step), diagnose=diagnose)
    teacher_seconds = 0.0
    grad_norm: float | None = None
    for index in range(accumulation):
        began = time.perf_counter()
        micro, said = next(lessons)
        teacher_seconds += time.perf_counter() - began
        terms = loss.terms(micro.to(topology.device), said, count)
        totals += _numbers(terms)
        if recompute and index == 0:
            again = replace(loss, teacher=replace(teacher, store=None)) if isinstance(teacher, Teacher) else loss
            _require_same(terms, again, micro.to(topology.device), said, count, topology)
        objective_value = terms.loss
        if index == accumulation - 1:
            told = flags()
            sums = _reduced(totals, list(told.values()), topology)  # a device sync, one a step
            means = dict(zip((*names, *told), sums, strict=True))
            metrics = {name: means[name] for name in METRIC_NAMES}
            require_sound_teacher(step, metrics)
            if not finite(metrics):
                objective_value = objective_value * math.nan
        with timeline.span(timeline.COMPUTE, "student backward"):
            student.backward(objective_value)
        with timeline.span(timeline.COMPUTE, "optimizer step" if index == accumulation - 1 else "accumulate"):
            grad_norm = student.step(learning_rate)
    assert grad_norm is not None, "the last micro-batch ends the accumulation window"
    return StepOutcome(
        metrics=metrics,
        grad_norm=grad_norm,
        flags={name: means[name] for name in told},
        teacher_seconds=teacher_seconds,
        diagnostics=_finite(means, DIAGNOSTIC_NAMES) if diagnose else None,
    )


@dataclass(frozen=True)
class _Loss:
    """The loss of one step, for its micro-batches."""

    student: StudentEngine
    teacher: Teacher | StoredTeacher | None
    objective: Objective
    divergence: Divergence
    diagnose: bool

    def terms(self, batch: TokenBatch, said: Tensor | SparseTargets | None, count: Tensor) -> LossTerms:
        """Of a micro-batch; `said` is what its teacher says of it."""
        with timeline.span(timeline.COMPUTE, "student forward"):
            hidden = self.student.hidden(batch.tokens, batch.positions)
        with timeline.span(timeline.COMPUTE, "loss"):
            return self._of(hidden, batch, said, count)

    def _of(self, hidden: Tensor, batch: TokenBatch, said: Tensor | SparseTargets | None, count: Tensor) -> LossTerms:
        student, teacher, objective = self.student, self.teacher, self.objective
        labels = batch.labels.flatten()
        weights = (labels != IGNORED_LABEL).to(torch.float32).div_(count.to(torch.float32))
        if said is None:
            return label_loss(
                hidden,
                student.head.weight(),
                labels,
                token_weights=weights,
                vocab=student.head.vocab,
                z_loss=objective.loss.z_loss,
                student_logits=objective.student_logits,
                logit_memory=objective.logit_memory,
                elementwise=objective.elementwise,
            )
        if isinstance(teacher, Teacher) and isinstance(said, Tensor) and objective.loss.targets is not None:
            with timeline.span(timeline.COMPUTE, "teacher targets"):
                said = teacher.targets(said, batch, objective, student.head.vocab)
        if isinstance(said, SparseTargets):
            return sparse_distill_loss(
                hidden,
                student.head.weight(),
                said,
                labels,
                token_weights=weights,
                divergence=self.divergence,
                vocab=student.head.vocab,
                student_logits=objective.student_logits,
                logit_memory=objective.logit_memory,
                elementwise=objective.elementwise,
            )
        assert isinstance(teacher, Teacher)
        return distill_loss(
            hidden,
            student.head.weight(),
            said,
            teacher.head,
            labels,
            token_weights=weights,
            divergence=self.divergence,
            vocab=student.head.vocab,
            teacher_bias=teacher.bias,
            student_logits=objective.student_logits,
            teacher_logits=teacher.logits,
            logit_memory=objective.logit_memory,
            elementwise=objective.elementwise,
            diagnose=self.diagnose,
        )


def _reduced(totals: Tensor, told: list[float], topology: Topology) -> list[float]:
    numbers = torch.cat([totals, torch.tensor(told, dtype=totals.dtype).to(totals.device)])
    with timeline.span(timeline.WAIT, "numbers of the step"):
        reduced: list[float] = all_reduce_sum(numbers, topology.world_group).tolist()
    return reduced


def _require_same(
    terms: LossTerms,
    loss: _Loss,
    micro: TokenBatch,
    said: Tensor | SparseTargets | None,
    count: Tensor,
    topology: Topology,
) -> None:
    """Computes the terms of a micro-batch once more. Collective.

    Raises:
        OperatorFault: the result differs in a bit, on this rank or on another one.
    """
    with torch.no_grad():
        again = _numbers(loss.terms(micro, said, count))
    before = _numbers(terms)
    same = bool((again.view(torch.int64) == before.view(torch.int64)).all())
    if all_true(same, topology.device, topology.world_group):
        return
    if same:
        raise OperatorFault("another rank computed a micro-batch twice and got two results: its own line says so")
    differing = [f"{a!r} and {b!r}" for a, b in zip(before.tolist(), again.tolist(), strict=True) if a != b]
    raise OperatorFault(
        f"rank {topology.rank} on {socket.gethostname()} computed a micro-batch twice and got two results "
        f"({', '.join(differing[:3]) or 'zeros of two signs'}): its device or its memory is not to be trusted; leave "
        "the node out and start again"
    )


def _numbers(terms: LossTerms) -> Tensor:
    """[9] float64: `METRIC_NAMES`; with the closer look [25], `DIAGNOSTIC_NAMES` after them. One reduction for all."""
    if terms.diagnostics is None:
        return terms.metrics()
    d: Diagnostics = terms.diagnostics
    return torch.cat(
        [
            terms.metrics(),
            torch.stack([d.acceptance, d.reverse_kl, d.jsd]).double(),
            d.top_k_mass.double(),
            # A decile's sum has the weights of all tokens, of which it holds a tenth.
            DECILES * d.kl_by_entropy_decile.double(),
        ]
    )


def _finite(means: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {name: means[name] for name in names if math.isfinite(means[name])}
