"""Validates the student on held-out splits: before the first step, every few steps, and after the last one."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megadistill.config.recipe import Recipe
from megadistill.distributed.collectives import broadcast_object
from megadistill.distributed.topology import Topology
from megadistill.events import ValidationHistory, cross_entropy_of, read_validations
from megadistill.student.engine import StudentEngine
from megadistill.train.hooks.hook import Request, StepEvent
from megadistill.train.lookahead import StepBatches
from megadistill.train.objective import Objective
from megadistill.train.resilience.preemption import stop_reason
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.teacher.targets import Target
from megadistill.train.telemetry.metrics import RunLog
from megadistill.train.validation.held_out_batches import HeldOutBatch, HeldOutBatches, Validations
from megadistill.train.validation.validate import Measured, describe, measure
from megadistill.units import number_of

MAX_FAULTS = 5
"""Damaged held-out sequences of a rank that its log names."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationPlan:
    """The validations of an attempt, and those that the run has had."""

    schedule: Validations
    history: ValidationHistory

    @classmethod
    def of(
        cls, recipe: Recipe, held_out: HeldOutBatches, topology: Topology, *, folder: Path, step: int, last: int
    ) -> "ValidationPlan":
        """Those of an attempt that begins after `step`, of a run that ends after `last`. Collective.

        validation.jsonl has no lines of later steps then. An attempt begins with a validation where its step is due for
        one that the run has not had, as it may have been stopped before it; or where the run has had none at all.
        """
        section = recipe.validation
        assert section is not None
        history = ValidationHistory.of(read_validations(folder)) if topology.is_first else None
        history = broadcast_object(history, topology.world_group)
        assert history is not None
        is_due = step % section.every == 0 or step == last
        at_first = history.validations == 0 or (is_due and history.last_step < step)
        schedule = Validations(held_out, first_step=step, at_first=at_first, every=section.every, last=last)
        return cls(schedule, history)


class ValidationHook:
    """The last hook: a step that rolls back, or that ends an attempt on request, is not validated."""

    def __init__(
        self,
        plan: ValidationPlan,
        batches: StepBatches,
        student: StudentEngine,
        objective: Objective,
        recovery: Recovery,
        log: RunLog,
        topology: Topology,
        recipe: Recipe,
        stop_requested: Callable[[], str | None],
    ) -> None:
        """`stop_requested`: the stop requests that any rank has received. Collective."""
        assert recipe.validation is not None
        self.stopped_by: str | None = None
        """Stop requests for which a validation that was due was left out or broken off; the next start takes it."""
        self._stop_requested = stop_requested
        self._section, self._recipe = recipe.validation, recipe
        self._schedule, self._history = plan.schedule, plan.history
        self._batches, self._student, self._objective = batches, student, objective
        self._recovery, self._log, self._topology = recovery, log, topology
        # The first one may compile, as the first step does.
        self._limit = max(60 * recipe.distributed.timeout_minutes, recipe.resilience.step_timeout_seconds)
        self._masked: Mapping[str, int] = {}
        self._named = 0

    @property
    def finished(self) -> bool:
        """Whether the run is to end, since its patience is used up (`validation.stop`)."""
        limit = self._section.patience
        return self._section.stop and limit is not None and self._history.without_gain >= limit

    def before_first_step(self, step: int) -> None:
        """The validation that is due before an attempt's first step, if any. Collective."""
        if self._schedule.due(step):
            self._validate(step)

    def after_step(self, event: StepEvent) -> Request | None:
        if not self._schedule.due(event.step):
            return None
        self.stopped_by = stop_reason(event.outcome.flags)
        if self.stopped_by is None:
            self._validate(event.step)
        if self.stopped_by is not None:
            return Request.STOP
        return Request.FINISH if self.finished else None

    def _validate(self, step: int) -> None:
        began = time.perf_counter()
        measured = measure(
            self._student,
            self._watched(step),
            self._schedule.batches,
            objective=self._objective,
            topology=self._topology,
        )
        if self.stopped_by is not None:
            self._recovery.events.write("stop_requested", step=step, reason=self.stopped_by)
            logger.info("validation at step %d broken off (%s): the next start takes it", step, self.stopped_by)
            return
        seconds, cross_entropy = time.perf_counter() - began, cross_entropy_of(measured.splits)
        self._history = self._history.after(step, measured.splits)
        logger.info("%s", describe(measured, step=step, steps=self._schedule.last, seconds=seconds))
        self._log.validation(step, tokens=self._recovery.tokens, seconds=seconds, splits=measured.splits)
        self._recovery.validated(step, seconds, cross_entropy)
        self._report_masked(step, measured)
        self._report_plateau(step, cross_entropy)

    def _watched(self, step: int) -> Iterator[tuple[HeldOutBatch, Target | None]]:
        """The validation's micro-batches, for each of which the watchdog allows the time of a step.

        They end early where the run is to stop, whose notice may be shorter than a validation.
        """
        self._topology.watchdog.enter_phase("validating", step, limit=self._limit)
        for targeted in self._batches.validation():
            self.stopped_by = self._stop_requested()
            if self.stopped_by is not None:
                return
            yield targeted
            self._limit = self._recipe.resilience.step_timeout_seconds
            self._topology.watchdog.enter_phase("validating", step, limit=self._limit)

    def _report_masked(self, step: int, measured: Measured) -> None:
        """Reports damaged held-out sequences once an attempt, and again where there are more."""
        batches = self._schedule.batches
        for (split, slot), fault in list(batches.faults.items())[self._named : MAX_FAULTS]:
            logger.warning("validation.data.%s, slot %d: %s: left out", batches.splits[split].name, slot, fault)
        self._named = len(batches.faults)
        if measured.masked != self._masked:
            counts = ", ".join(f"{name} {count}" for name, count in measured.masked.items())
            line = f"validation: damaged sequences are left out ({counts}); `megadistill shards verify` lists them"
            self._recovery.events.warn("held_out_masked", line, step=step, splits=dict(measured.masked))
        self._masked = measured.masked

    def _report_plateau(self, step: int, cross_entropy: float) -> None:
        history, limit = self._history, self._section.patience
        if limit is None or history.without_gain != limit:
            return
        ends = "; validation.stop ends the run" if self._section.stop else ""
        line = (
            f"step {step}: the held-out cross-entropy has not been below {history.best:.4f} of step "
            f"{history.best_step} for {number_of(limit, 'validation')} (validation.patience){ends}"
        )
        values = {"best": _known(history.best), "best_step": history.best_step, "validations": limit}
        values["cross_entropy"] = _known(cross_entropy)
        self._recovery.events.warn("validation_plateau", line, step=step, **values)


def _known(value: float) -> float | None:
    """A number for JSON; None for one that is not finite."""
    return value if math.isfinite(value) else None
