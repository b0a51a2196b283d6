"""Advances a checkpoint that is being written while the run trains on."""

from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.recovery import Recovery


class SaveProgress:
    """Polls the save under way with the flags of all ranks."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery

    def after_step(self, event: StepEvent) -> None:
        self._recovery.poll(event.outcome.flags)
