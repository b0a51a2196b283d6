"""Stops the run after a step in which any rank received a stop request."""

from megadistill.events import EventLog
from megadistill.train.hooks.hook import Request, StepEvent
from megadistill.train.resilience.preemption import stop_reason


class StopOnRequest:
    """Reads the stop requests of all ranks from the step's flags."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    def after_step(self, event: StepEvent) -> Request | None:
        reason = stop_reason(event.outcome.flags)
        if reason is None:
            return None
        self._events.write("stop_requested", step=event.step, reason=reason)
        return Request.STOP
