"""Checkpoints between steps: fencing, progress of the save under way, a new one every few steps and before a decay."""

from megadistill.train.hooks.hook import Request, StepEvent
from megadistill.train.resilience.recovery import Recovery


class Checkpoints:
    """The first hook: where a later attempt has acquired the run folder, nothing of a step is written."""

    def __init__(self, recovery: Recovery, *, every: int, stable_steps: int = 0) -> None:
        self._recovery, self._every, self._stable_steps = recovery, every, stable_steps

    def after_step(self, event: StepEvent) -> Request | None:
        """
        Raises:
            OperatorFault: a later attempt has the folder.
        """
        self._recovery.require_newest(event.outcome.flags)
        self._recovery.poll(event.outcome.flags)
        return Request.SAVE if event.step % self._every == 0 or event.step == self._stable_steps else None
