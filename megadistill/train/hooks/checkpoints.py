"""Checkpoints between steps: fencing, progress of the save under way, a new one every few steps and before a decay.

A save of the local tier that falls due while another save is under way waits for its end, so that no step does.
"""

from megadistill.train.hooks.hook import Request, StepEvent
from megadistill.train.resilience.recovery import Recovery


class Checkpoints:
    """The first hook: where a later attempt has acquired the run folder, nothing of a step is written."""

    def __init__(self, recovery: Recovery, *, every: int, stable_steps: int = 0, local_every: int = 0) -> None:
        self._recovery, self._every, self._stable_steps = recovery, every, stable_steps
        self._local_every, self._local_is_due = local_every, False  # 0: no local tier

    def after_step(self, event: StepEvent) -> Request | None:
        """
        Raises:
            OperatorFault: a later attempt has the folder.
        """
        self._recovery.require_newest(event.outcome.flags)
        self._recovery.poll(event.outcome.flags)
        if event.step % self._every == 0 or event.step == self._stable_steps:
            self._local_is_due = False
            return Request.SAVE
        self._local_is_due |= self._local_every > 0 and event.step % self._local_every == 0
        if not self._local_is_due or self._recovery.saving:
            return None
        self._local_is_due = False
        return Request.SAVE_LOCAL
