"""One optimizer step: gradient accumulation over its micro-batches, checks, the update.

Legend: B sequences of a micro-batch, S tokens of a sequence, N = B·S.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadistill import timeline
from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.loss import Divergence, Head
from megadistill.models.experts import RouterCoefs
from megadistill.student.engine import StudentEngine
from megadistill.student.routers import RouterSums
from megadistill.train.lookahead import StepBatch
from megadistill.train.objective import Objective
from megadistill.train.resilience.anomalies import finite, require_sound_teacher
from megadistill.train.resilience.sdc import REMEDY, describe_rank, raise_everywhere
from megadistill.train.router_losses import ExpertLoad, RouterLosses, router_numbers, token_weights
from megadistill.train.teacher.targets import StudentOutput, TargetedBatch
from megadistill.types import DECILES, DIAGNOSTIC_NAMES, METRIC_NAMES, Diagnostics, LossTerms, to_device


@dataclass(frozen=True)
class StepOutcome:
    """Results of a step, the same on every rank."""

    metrics: dict[str, float]
    """Means over the step's tokens of all ranks, by `METRIC_NAMES`."""
    grad_norm: float
    """Global gradient norm before clipping; not finite if the step was skipped."""
    flags: dict[str, float]
    """The flags of `train_step`, summed over ranks."""
    labels: int = 0
    """Tokens of the step, on all ranks, that have a label: without padding, corrupt samples, and with `document_mask`
    the last token of a document."""
    diagnostics: dict[str, float] | None = None
    """Means by `DIAGNOSTIC_NAMES`, on steps that compute them; the KL of a decile over its own tokens. An infinite one
    is left out: the reverse KL against a teacher that does not know some ids."""
    experts: ExpertLoad | None = None
    """Load of the experts; None for a student without any."""
    by_teacher: Sequence[float] = ()
    """`LossTerms.by_teacher`, summed over micro-batches and ranks; empty for one teacher."""

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
    progress: int | None = None,
) -> StepOutcome:
    """Accumulates gradients over the batch's micro-batches and takes one optimizer step. Collective over the world.

    A loss or a gradient that is not finite on any rank makes all of them skip the step: its last gradient is made not
    finite everywhere, and a step whose gradient norm is not is discarded (`student.flat_step`).

    The division by the global token count is here and nowhere else: it is in the tokens' weights. The host waits for
    the device in each micro-batch where the ranks of the loss exchange their token counts, and where the teacher's
    digests are compared; and in each step where its metrics are read, and its gradient norm. Each wait lets the device
    run dry for some tens of microseconds. DeepSpeed has waits of its own, one a backward pass.

    Args:
        flags: numbers of this rank, called just before the one reduction of the step's metrics, with which they are
            summed over ranks; every rank returns the same names.
        recompute: the first micro-batch is computed twice and compared.
        progress: where the schedule of the loss stands (`train.schedule.progress`); None: at `step`.

    Raises:
        OperatorFault: the teacher's numbers are not finite, or computing twice gives two results; the optimizer has not
            moved.
        SignalMismatch, UserError, ShardFault: see `Teacher.teacher_targets`.
    """
    forward = _Forward.of(student, batch, step=step, progress=progress, objective=objective, topology=topology)
    totals: Tensor | None = None
    by_teacher: Tensor | None = None
    grad_norm: float | None = None
    for index in range(batch.accumulation):
        with timeline.timed(timeline.Part.TEACHER):
            targeted = next(batch.micro_batches)
        loss, numbers, groups = forward(targeted)
        totals = numbers if totals is None else totals + numbers
        by_teacher = groups if by_teacher is None else by_teacher + groups
        if recompute and index == 0:
            _require_reproduced(numbers, forward, targeted, topology)
        if index == batch.accumulation - 1:
            own_flags = flags()
            reduced, labels, reduced_flags = _reduced(
                torch.cat([totals, by_teacher]), forward.labels, own_flags, topology
            )
            reduced, reduced_groups = reduced[: len(totals)], reduced[len(totals) :]
            metrics = dict(zip(METRIC_NAMES, reduced, strict=False))
            require_sound_teacher(step, metrics)
            if not finite(metrics):
                loss = loss * math.nan
        with timeline.timed(timeline.Part.STUDENT):
            with timeline.span(timeline.COMPUTE, "student backward"):
                student.backward(loss)
            with timeline.span(timeline.COMPUTE, "optimizer step" if index == batch.accumulation - 1 else "accumulate"):
                grad_norm = student.step(learning_rate)
    assert grad_norm is not None, "the last micro-batch ends the accumulation window"
    return StepOutcome(
        metrics=metrics,
        grad_norm=grad_norm,
        flags=reduced_flags,
        labels=labels,
        diagnostics=forward.diagnostics_of(reduced),
        experts=forward.experts_of(reduced, labels=labels),
        by_teacher=reduced_groups,
    )


def _global_labels(batch: StepBatch, topology: Topology) -> Tensor:
    """[] float64: tokens with a label in the global batch."""
    count = torch.full((), batch.batch.valid_tokens, dtype=torch.float64, device=topology.device)
    with timeline.span(timeline.WAIT, "count tokens"):
        return all_reduce_sum(count, topology.world_group)


@dataclass(frozen=True)
class _Forward:
    """The student's forward pass and loss, for the micro-batches of one step."""

    student: StudentEngine
    objective: Objective
    divergence: Divergence
    diagnostics: bool
    labels: Tensor
    """See `_global_labels`."""
    tokens: Tensor
    """`labels`, at least 1: the weight of a token is one over it."""
    device: torch.device
    routers: RouterLosses | None
    """None for a student without experts."""

    @classmethod
    def of(
        cls,
        student: StudentEngine,
        batch: StepBatch,
        *,
        step: int,
        progress: int | None,
        objective: Objective,
        topology: Topology,
    ) -> "_Forward":
        """The forward pass of a step's batch. Collective."""
        labels, routers = _global_labels(batch, topology), None
        tokens = labels.clamp(min=1.0)
        if student.routers is not None:
            coefs = objective.router_coefs
            with timeline.timed(timeline.Part.STUDENT):
                routers = RouterLosses.of(student, batch, coefs=coefs, tokens=tokens, topology=topology)
        return cls(
            student,
            objective,
            objective.divergence(step if progress is None else progress),
            diagnostics=objective.computes_diagnostics(step),
            labels=labels,
            tokens=tokens,
            device=topology.device,
            routers=routers,
        )

    def __call__(self, targeted: TargetedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of a micro-batch, its numbers (see `_numbers`), and those by teacher [T·K·6], [0] for one teacher."""
        micro = targeted.batch.to(self.device)
        labels = micro.labels.flatten()
        weights = token_weights(labels, self.tokens)
        with timeline.timed(timeline.Part.STUDENT), timeline.span(timeline.COMPUTE, "student forward"):
            hidden, sums = self.student.routed_hidden(
                micro.tokens, micro.positions, weights, differentiable=self.objective.router_coefs != RouterCoefs()
            )
        with timeline.timed(timeline.Part.LOSS), timeline.span(timeline.COMPUTE, "loss"):
            output = StudentOutput(
                head=Head(
                    hidden,
                    self.student.head.weight(),
                    transform=self.objective.student_logits,
                    weight_gradient=self.student.head.gradient(),
                ),
                labels=labels,
                token_weights=weights,
                vocab=self.student.head.vocab,
                objective=self.objective,
                divergence=self.divergence,
                options=self.objective.options(diagnostics=self.diagnostics),
            )
            terms = targeted.target.loss(output)
            if self.routers is not None and sums is not None:
                terms = replace(terms, loss=terms.loss + self.routers.loss(sums))
        groups = weights.new_empty(0, dtype=torch.float64) if terms.by_teacher is None else terms.by_teacher.flatten()
        return terms.loss, _numbers(terms, sums), groups

    def diagnostics_of(self, reduced: Sequence[float]) -> dict[str, float] | None:
        """The diagnostics among a step's reduced numbers; None where it has none."""
        if not self.diagnostics:
            return None
        values = reduced[len(METRIC_NAMES) :]
        return _finite(dict(zip(DIAGNOSTIC_NAMES, values, strict=False)), DIAGNOSTIC_NAMES)

    def experts_of(self, reduced: Sequence[float], *, labels: int) -> ExpertLoad | None:
        """The load of the experts among a step's reduced numbers."""
        if self.student.routers is None:
            return None
        before = len(METRIC_NAMES) + (len(DIAGNOSTIC_NAMES) if self.diagnostics else 0)
        return ExpertLoad.of(reduced[before:], self.student.routers.layers, valid_tokens=max(1.0, labels))


def _reduced(
    totals: Tensor, labels: Tensor, flags: Mapping[str, float], topology: Topology
) -> tuple[list[float], int, dict[str, float]]:
    """`totals` and the flags by name, summed over ranks in one reduction; and the global `labels`, read with them.

    The step's host-device sync.
    """
    own_flags = to_device(torch.tensor(list(flags.values()), dtype=totals.dtype), totals.device)
    with timeline.span(timeline.WAIT, "numbers of the step"):
        sums = all_reduce_sum(torch.cat([totals, own_flags]), topology.world_group)
        *reduced, count = torch.cat([sums, labels.view(1)]).tolist()
    return reduced[: len(totals)], int(count), dict(zip(flags, reduced[len(totals) :], strict=True))


def _require_reproduced(numbers: Tensor, forward: _Forward, targeted: TargetedBatch, topology: Topology) -> None:
    """Computes a micro-batch once more and compares with its `numbers`. Collective.

    Raises:
        OperatorFault: the result differs in a bit, on this rank or on another one.
    """
    with torch.no_grad():
        _, again, _ = forward(targeted)
    problem = None
    if not torch.equal(again.view(torch.int64), numbers.view(torch.int64)):
        differing = [f"{a!r} and {b!r}" for a, b in zip(numbers.tolist(), again.tolist(), strict=True) if a != b]
        problem = (
            f"{describe_rank(topology)} computed a micro-batch twice and got two results "
            f"({', '.join(differing[:3]) or 'zeros of two signs'}); {REMEDY}"
        )
    raise_everywhere(problem, "another rank computed a micro-batch twice and got two results", topology)


def _numbers(terms: LossTerms, sums: RouterSums | None = None) -> Tensor:
    """Float64: `METRIC_NAMES`, with diagnostics `DIAGNOSTIC_NAMES` after them, with experts `router_numbers` last."""
    parts = [terms.metrics()]
    if terms.diagnostics is not None:
        d: Diagnostics = terms.diagnostics
        parts += [
            torch.stack([d.kl, d.acceptance, d.reverse_kl, d.jsd]).double(),
            d.top_k_mass.double(),
            # A decile's sum has the weights of all tokens, of which it holds a tenth.
            DECILES * d.kl_by_entropy_decile.double(),
        ]
    if sums is not None:
        parts.append(router_numbers(sums))
    return torch.cat(parts)


def _finite(means: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {name: means[name] for name in names if math.isfinite(means[name])}
