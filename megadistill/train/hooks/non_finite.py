"""Records steps skipped for a non-finite loss or gradient, and ends a run that skips too many."""

from megadistill.errors import OperatorFault
from megadistill.events import EventLog
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.anomalies import not_finite


class NonFiniteGuard:
    """Counts skipped steps in a row."""

    def __init__(self, events: EventLog, *, max_skipped_steps: int) -> None:
        self._events = events
        self._max_skipped_steps = max_skipped_steps
        self._in_a_row = 0

    def after_step(self, event: StepEvent) -> None:
        """
        Raises:
            OperatorFault: more than `max_skipped_steps` in a row.
        """
        if not event.outcome.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        reason = not_finite(event.outcome.metrics, event.outcome.grad_norm)
        self._events.warn("step_skipped", f"step {event.step} skipped: {reason}", step=event.step, reason=reason)
        if self._in_a_row > self._max_skipped_steps:
            raise OperatorFault(
                f"step {event.step}: {reason}, and {self._in_a_row} consecutive steps were skipped "
                f"(resilience.max_skipped_steps is {self._max_skipped_steps}), so the student diverged. If "
                "metrics.jsonl shows that it began earlier, move the checkpoints since then away; then lower "
                "train.optimizer.learning_rate or train.max_grad_norm, or correct the data"
            )
