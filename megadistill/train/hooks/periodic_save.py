"""Saves a checkpoint every `train.checkpoint_every` steps."""

from megadistill.train.hooks.hook import Request, StepEvent


class PeriodicSave:
    def __init__(self, *, every: int) -> None:
        self._every = every

    def after_step(self, event: StepEvent) -> Request | None:
        return Request.SAVE if event.step % self._every == 0 else None
