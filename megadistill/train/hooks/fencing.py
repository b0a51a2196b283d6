"""Ends an attempt as soon as a later attempt has acquired the run folder."""

from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.recovery import Recovery


class Fencing:
    """The first hook: nothing of a step is written before it."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery

    def after_step(self, event: StepEvent) -> None:
        """
        Raises:
            OperatorFault: a later attempt has the folder.
        """
        self._recovery.require_newest(event.outcome.flags)
