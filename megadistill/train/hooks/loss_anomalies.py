"""Detects loss spikes and teacher drift; rolls back to before a spike where the recipe allows it."""

import logging
from collections import deque

from megadistill.config.recipe import Recipe
from megadistill.distributed.topology import Topology
from megadistill.train.hooks.hook import Request, StepEvent
from megadistill.train.resilience.anomalies import Anomaly, LossMonitor
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.resilience.sdc import FrozenWeights

logger = logging.getLogger(__name__)


class LossAnomalies:
    """Monitors the losses of every step that was not skipped."""

    def __init__(
        self,
        recipe: Recipe,
        monitor: LossMonitor,
        recovery: Recovery,
        topology: Topology,
        *,
        first_slot: int,
        frozen: FrozenWeights | None,
    ) -> None:
        """
        Args:
            first_slot: first slot of the first step.
            frozen: the teacher's weights, compared when its cross-entropy drifts.
        """
        self._monitor, self._recovery, self._topology = monitor, recovery, topology
        self._frozen = frozen
        self._teacher_ce = recipe.objective == "distill" and recipe.loss.targets is None
        """Whether the metrics have the teacher's cross-entropy: with truncated targets it is unknown."""
        self._next_slots = deque([first_slot], maxlen=recipe.resilience.rollback_steps + 1)

    def after_step(self, event: StepEvent) -> Request | None:
        """
        Raises:
            OperatorFault: the teacher drifts, and its weights have changed.
        """
        self._next_slots.append(event.cursor.next_slot)
        self._monitor.begin_entry(event.shape.entry)
        if event.outcome.skipped:
            return None
        if self._teacher_ce:
            self._check_teacher(event)
        spike = self._monitor.spike(event.step, event.outcome.metrics["loss"])
        return None if spike is None else self._maybe_roll_back(spike, event)

    def _check_teacher(self, event: StepEvent) -> None:
        slots = self._next_slots[-2], self._next_slots[-1] - 1
        alarm = self._monitor.teacher_drift(event.step, event.outcome.metrics["teacher_ce"], slots)
        if alarm is None:
            return
        self._record(alarm, event)
        if self._frozen is not None:
            self._frozen.require_unchanged(self._topology)
            logger.info("the teacher's weights on the student's ranks are unchanged since they were loaded")

    def _maybe_roll_back(self, spike: Anomaly, event: StepEvent) -> Request | None:
        self._record(spike, event)
        *before, end = self._next_slots
        slots_before = {event.step - back: slot for back, slot in enumerate(reversed(before))}
        rolls_back = self._recovery.roll_back(spike, event.step, slots_before=slots_before, slots_end=end)
        return Request.ROLL_BACK if rolls_back else None

    def _record(self, anomaly: Anomaly, event: StepEvent) -> None:
        self._recovery.events.warn(anomaly.event, anomaly.line, step=event.step, **anomaly.values)
