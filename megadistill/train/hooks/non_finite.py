"""Records steps that were skipped, since a loss or a gradient was not finite, and ends a run that skips too many."""

from megadistill.events import EventLog
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.anomalies import SkippedSteps, not_finite


class NonFiniteGuard:
    """Counts skipped steps in a row."""

    def __init__(self, events: EventLog, *, max_skipped_steps: int) -> None:
        self._events = events
        self._skipped = SkippedSteps(max_skipped_steps)

    def after_step(self, event: StepEvent) -> None:
        """
        Raises:
            OperatorFault: more than `max_skipped_steps` in a row.
        """
        outcome = event.outcome
        if outcome.skipped:
            reason = not_finite(outcome.metrics, outcome.grad_norm)
            self._events.warn("step_skipped", f"step {event.step} skipped: {reason}", step=event.step, reason=reason)
        self._skipped.count(event.step, outcome.metrics, outcome.grad_norm)
