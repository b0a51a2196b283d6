"""One optimizer step: gradient accumulation over its micro-batches, checks, the update.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.loss import Divergence, Head
from megadistill.student.engine import StudentEngine
from megadistill.train.lookahead import StepBatch
from megadistill.train.objective import Objective
from megadistill.train.resilience.anomalies import finite, require_sound_teacher
from megadistill.train.resilience.sdc import REMEDY, describe_rank, raise_everywhere
from megadistill.train.teacher.targets import StudentOutput, TargetedBatch
from megadistill.types import DECILES, DIAGNOSTIC_NAMES, IGNORED_LABEL, METRIC_NAMES, Diagnostics, LossTerms


@dataclass(frozen=True)
class StepOutcome:
    """Results of a step, the same on every rank but for `teacher_seconds`."""

    metrics: dict[str, float]
    """Means over the step's tokens of all ranks, by `METRIC_NAMES`."""
    grad_norm: float
    """Global gradient norm before clipping; not finite if the step was skipped."""
    flags: dict[str, float]
    """The flags of `train_step`, summed over ranks."""
    teacher_seconds: float
    """Seconds that this rank waited for targets."""
    diagnostics: dict[str, float] | None = None
    """Means by `DIAGNOSTIC_NAMES`, on steps that compute them; the KL of a decile over its own tokens. An infinite one
    is left out: the reverse KL against a teacher that does not know some ids."""

    @property
    def skipped(self) -> bool:
        """Whether the optimizer step was skipped; the same on every rank."""
        return not math.isfinite(self.grad_norm)


def train_step(
    student: StudentEngine,
    batch: StepBatch,
    *,
    step: int,
    learning_rate: float,
    objective: Objective,
    topology: Topology,
    flags: Callable[[], Mapping[str, float]] = dict,
    recompute: bool = False,
) -> StepOutcome:
    """Accumulates gradients over the batch's micro-batches and takes one optimizer step. Collective over the world.

    A loss or a gradient that is not finite on any rank makes all of them skip the step: its last gradient is made not
    finite everywhere, and DeepSpeed discards a step whose gradient norm is not.

    The division by the global token count is here and nowhere else: it is in the tokens' weights. Besides the metrics
    and the gradient norm, the host waits for the device in each micro-batch, where the ranks of the loss exchange their
    token counts and where the teacher's digests are compared.

    Args:
        flags: numbers of this rank, called just before the one reduction of the step's metrics, with which they are
            summed over ranks; every rank returns the same names.
        recompute: the first micro-batch is computed twice and compared.

    Raises:
        OperatorFault: the teacher's numbers are not finite, or computing twice gives two results; the optimizer has not
            moved.
        SignalMismatch, UserError, ShardFault: see `Teacher.teacher_targets`.
    """
    forward = _Forward(
        student,
        objective,
        objective.divergence(step),
        diagnostics=objective.computes_diagnostics(step),
        tokens=_global_tokens(batch, topology),
        device=topology.device,
    )
    totals: Tensor | None = None
    teacher_seconds = 0.0
    grad_norm: float | None = None
    for index in range(batch.accumulation):
        began = time.perf_counter()
        targeted = next(batch.micro_batches)
        teacher_seconds += time.perf_counter() - began
        terms = forward(targeted)
        numbers = _numbers(terms)
        totals = numbers if totals is None else totals + numbers
        if recompute and index == 0:
            _require_reproduced(numbers, forward, targeted, topology)
        loss = terms.loss
        if index == batch.accumulation - 1:
            own_flags = flags()
            means, reduced_flags = _reduced(totals, own_flags, topology)  # a device sync, one a step
            metrics = {name: means[name] for name in METRIC_NAMES}
            require_sound_teacher(step, metrics)
            if not finite(metrics):
                loss = loss * math.nan
        with timeline.span(timeline.COMPUTE, "student backward"):
            student.backward(loss)
        with timeline.span(timeline.COMPUTE, "optimizer step" if index == batch.accumulation - 1 else "accumulate"):
            grad_norm = student.step(learning_rate)
    assert grad_norm is not None, "the last micro-batch ends the accumulation window"
    return StepOutcome(
        metrics=metrics,
        grad_norm=grad_norm,
        flags=reduced_flags,
        teacher_seconds=teacher_seconds,
        diagnostics=_finite(means, DIAGNOSTIC_NAMES) if len(means) > len(METRIC_NAMES) else None,
    )


def _global_tokens(batch: StepBatch, topology: Topology) -> Tensor:
    """[] float64: tokens with a label in the global batch, at least 1."""
    count = torch.tensor(batch.batch.valid_tokens, dtype=torch.float64, device=topology.device)
    with timeline.span(timeline.WAIT, "count tokens"):
        return all_reduce_sum(count, topology.world_group).clamp_(min=1.0)


@dataclass(frozen=True)
class _Forward:
    """The student's forward pass and loss, for the micro-batches of one step."""

    student: StudentEngine
    objective: Objective
    divergence: Divergence
    diagnostics: bool
    tokens: Tensor
    """See `_global_tokens`."""
    device: torch.device

    def __call__(self, targeted: TargetedBatch) -> LossTerms:
        micro = targeted.batch.to(self.device)
        with timeline.span(timeline.COMPUTE, "student forward"):
            hidden = self.student.hidden(micro.tokens, micro.positions)
        with timeline.span(timeline.COMPUTE, "loss"):
            labels = micro.labels.flatten()
            output = StudentOutput(
                head=Head(hidden, self.student.head.weight(), transform=self.objective.student_logits),
                labels=labels,
                token_weights=(labels != IGNORED_LABEL).to(torch.float32).div_(self.tokens.to(torch.float32)),
                vocab=self.student.head.vocab,
                objective=self.objective,
                divergence=self.divergence,
                options=self.objective.options(diagnostics=self.diagnostics),
            )
            return targeted.target.loss(output)


def _reduced(
    totals: Tensor, flags: Mapping[str, float], topology: Topology
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics (and diagnostics) and flags by name, summed over ranks in one reduction."""
    numbers = torch.cat([totals, torch.tensor(list(flags.values()), dtype=totals.dtype).to(totals.device)])
    with timeline.span(timeline.WAIT, "numbers of the step"):
        reduced = all_reduce_sum(numbers, topology.world_group).tolist()
    names = (*METRIC_NAMES, *DIAGNOSTIC_NAMES)[: len(totals)]
    return dict(zip(names, reduced, strict=False)), dict(zip(flags, reduced[len(totals) :], strict=True))


def _require_reproduced(numbers: Tensor, forward: _Forward, targeted: TargetedBatch, topology: Topology) -> None:
    """Computes a micro-batch once more and compares with its `numbers`. Collective.

    Raises:
        OperatorFault: the result differs in a bit, on this rank or on another one.
    """
    with torch.no_grad():
        again = _numbers(forward(targeted))
    problem = None
    if not torch.equal(again.view(torch.int64), numbers.view(torch.int64)):
        differing = [f"{a!r} and {b!r}" for a, b in zip(numbers.tolist(), again.tolist(), strict=True) if a != b]
        problem = (
            f"{describe_rank(topology)} computed a micro-batch twice and got two results "
            f"({', '.join(differing[:3]) or 'zeros of two signs'}); {REMEDY}"
        )
    raise_everywhere(problem, "another rank computed a micro-batch twice and got two results", topology)


def _numbers(terms: LossTerms) -> Tensor:
    """[9] float64: `METRIC_NAMES`; with diagnostics [26], `DIAGNOSTIC_NAMES` after them."""
    if terms.diagnostics is None:
        return terms.metrics()
    d: Diagnostics = terms.diagnostics
    return torch.cat(
        [
            terms.metrics(),
            torch.stack([d.kl, d.acceptance, d.reverse_kl, d.jsd]).double(),
            d.top_k_mass.double(),
            # A decile's sum has the weights of all tokens, of which it holds a tenth.
            DECILES * d.kl_by_entropy_decile.double(),
        ]
    )


def _finite(means: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {name: means[name] for name in names if math.isfinite(means[name])}
