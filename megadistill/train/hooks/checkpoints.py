"""Checkpoints between steps: fencing, progress of the save under way, and a new one every few steps."""

from megadistill.train.hooks.hook import Request, StepEvent
from megadistill.train.resilience.recovery import Recovery


class Checkpoints:
    """The first hook: where a later attempt has acquired the run folder, nothing of a step is written."""

    def __init__(self, recovery: Recovery, *, every: int) -> None:
        self._recovery, self._every = recovery, every

    def after_step(self, event: StepEvent) -> Request | None:
        """
        Raises:
            OperatorFault: a later attempt has the folder.
        """
        self._recovery.require_newest(event.outcome.flags)
        self._recovery.poll(event.outcome.flags)
        return Request.SAVE if event.step % self._every == 0 else None
