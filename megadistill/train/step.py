"""One optimizer step: accumulate, check, move. It knows no files.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S.
"""

import math
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.comm.collectives import all_reduce_sum
from megadistill.comm.topology import Topology
from megadistill.loss import Divergence, distill_loss, label_loss, sparse_distill_loss
from megadistill.loss.targets import sparse_targets
from megadistill.records import (
    IGNORED_LABEL,
    METRIC_NAMES,
    TOP_K,
    Diagnostics,
    LogitTransform,
    LossTerms,
    SparseTargets,
    TokenBatch,
)
from megadistill.student.engine import StudentEngine
from megadistill.teacher import RemoteTeacher, TeacherPipeline
from megadistill.train.health import require_finite
from megadistill.train.objective import Objective, selection, uniforms
from megadistill.train.vocab_map import translated

DECILES = 10
DIAGNOSTIC_NAMES = (
    "acceptance",
    "reverse_kl",
    "jsd",
    *(f"top_{k}_mass" for k in TOP_K),
    *(f"kl_entropy_decile_{decile}" for decile in range(1, DECILES + 1)),
)


Lesson = tuple[TokenBatch, Tensor | None]
"""A micro-batch, and the teacher's hidden states [N, E] for it."""


@dataclass(frozen=True)
class Teacher:
    """The frozen side of the loss: the pipeline, and the head's rows of this rank's slice of the vocabulary [v, E]."""

    pipeline: TeacherPipeline | RemoteTeacher
    head: Tensor
    bias: Tensor | None = None
    """[v]: -inf for an id that the teacher does not know; None where it knows all."""
    logits: LogitTransform = LogitTransform()
    ids: Tensor | None = None
    """[true vocabulary] int64, on the host: the teacher's id for each of the student's; None: the same ids."""

    def lessons(self, batches: Iterator[TokenBatch]) -> Generator[Lesson, None, None]:
        """Each batch with the hidden states [N, E] that answer it. Collective; see `TeacherPipeline.signals`.

        Raises:
            UserError: a token that the teacher has no id for; SignalMismatch: the teacher answered another batch.
        """
        under_way: deque[tuple[TokenBatch, TokenBatch]] = deque()

        def entering() -> Iterator[TokenBatch]:
            for batch in batches:
                read = batch if self.ids is None else translated(batch, self.ids)
                under_way.append((batch, read))
                yield read

        with closing(self.pipeline.signals(entering())) as signals:
            for signal in signals:
                batch, read = under_way.popleft()
                yield batch, signal.hidden_for(read)


def lessons(teacher: Teacher | None, batches: Iterator[TokenBatch]) -> Generator[Lesson, None, None]:
    """The micro-batches of a run with what the teacher says of each; None where there is no teacher.

    Close it when the run ends: the teacher's ranks are told then.
    """
    return teacher.lessons(batches) if teacher is not None else ((batch, None) for batch in batches)


@dataclass(frozen=True)
class StepOutcome:
    """What a step computed: means over the tokens of all ranks, by `METRIC_NAMES`."""

    metrics: dict[str, float]
    grad_norm: float
    teacher_seconds: float
    diagnostics: dict[str, float] | None = None
    """By `DIAGNOSTIC_NAMES`, on the steps that take the closer look, but for what is infinite: the reverse KL against a
    teacher that does not know some ids. The KL of a decile is the mean over its own tokens."""


def train_step(
    student: StudentEngine,
    teacher: Teacher | None,
    lessons: Iterator[Lesson],
    *,
    step: int,
    accumulation: int,
    valid_tokens: int,
    learning_rate: float,
    objective: Objective,
    topology: Topology,
) -> StepOutcome:
    """Accumulates over the next `accumulation` lessons and takes one optimizer step. Collective over the world.

    `valid_tokens` are those of this rank's share of the step. The division by the global token count stands here, and
    nowhere else: it is in the tokens' weights. Besides the metrics and the gradient norm, the host waits for the device
    in each micro-batch, where the ranks of the loss agree on their token counts and where the teacher's digests are
    compared.

    Raises:
        OperatorFault: a number is not finite; the optimizer has not moved.
        SignalMismatch, UserError: see `Teacher.lessons`.
    """
    count = torch.tensor(valid_tokens, dtype=torch.float64, device=topology.device)
    count = all_reduce_sum(count, topology.world_group).clamp_(min=1.0)
    diagnose = teacher is not None and objective.diagnoses(step)
    names = (*METRIC_NAMES, *DIAGNOSTIC_NAMES) if diagnose else METRIC_NAMES
    totals = torch.zeros(len(names), dtype=torch.float64, device=topology.device)
    loss = _Loss(student, teacher, objective, objective.divergence(step), diagnose=diagnose)
    teacher_seconds = 0.0
    grad_norm: float | None = None
    for index in range(accumulation):
        began = time.perf_counter()
        micro, teacher_hidden = next(lessons)
        teacher_seconds += time.perf_counter() - began
        terms = loss.terms(micro.to(topology.device), teacher_hidden, count)
        totals += _numbers(terms)
        if index == accumulation - 1:
            all_reduce_sum(totals, topology.world_group)
            means = dict(zip(names, totals.tolist(), strict=True))  # a device sync, one a step
            metrics = {name: means[name] for name in METRIC_NAMES}
            require_finite(step, metrics)
        student.backward(terms.loss)
        grad_norm = student.step(learning_rate)
    assert grad_norm is not None, "the last micro-batch ends the accumulation window"
    require_finite(step, {"grad_norm": grad_norm})
    return StepOutcome(
        metrics=metrics,
        grad_norm=grad_norm,
        teacher_seconds=teacher_seconds,
        diagnostics=_finite(means, DIAGNOSTIC_NAMES) if diagnose else None,
    )


@dataclass(frozen=True)
class _Loss:
    """The loss of one step, for its micro-batches."""

    student: StudentEngine
    teacher: Teacher | None
    objective: Objective
    divergence: Divergence
    diagnose: bool

    def terms(self, batch: TokenBatch, teacher_hidden: Tensor | None, count: Tensor) -> LossTerms:
        """Of a micro-batch; `teacher_hidden` is what its teacher says of it."""
        student, teacher, objective = self.student, self.teacher, self.objective
        labels = batch.labels.flatten()
        weights = (labels != IGNORED_LABEL).to(torch.float32).div_(count.to(torch.float32))
        hidden = student.hidden(batch.tokens, batch.positions)
        if teacher is None or teacher_hidden is None:
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
        if objective.loss.targets is not None:
            return sparse_distill_loss(
                hidden,
                student.head.weight(),
                self._targets(teacher, teacher_hidden, batch),
                labels,
                token_weights=weights,
                divergence=self.divergence,
                vocab=student.head.vocab,
                student_logits=objective.student_logits,
                logit_memory=objective.logit_memory,
                elementwise=objective.elementwise,
            )
        return distill_loss(
            hidden,
            student.head.weight(),
            teacher_hidden,
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

    def _targets(self, teacher: Teacher, teacher_hidden: Tensor, batch: TokenBatch) -> SparseTargets:
        section = self.objective.loss.targets
        assert section is not None
        kept, tail = selection(section)
        draws = None
        if section.draws is not None:
            sequence = batch.tokens.shape[1]
            draws = uniforms(batch.slots, sequence=sequence, draws=section.draws, seed=self.objective.seed)
            draws = draws.to(teacher_hidden.device)
        return sparse_targets(
            teacher_hidden,
            teacher.head,
            selection=kept,
            tail=tail,
            vocab=self.student.head.vocab,
            temperature=self.divergence.temperature,
            uniforms=draws,
            teacher_bias=teacher.bias,
            teacher_logits=teacher.logits,
            logit_memory=self.objective.logit_memory,
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
