"""Advances a checkpoint that is being written while the run trains on."""

from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.telemetry.metrics import RunLog


class SaveProgress:
    """Polls the save under way with the flags of all ranks, and logs its end."""

    def __init__(self, recovery: Recovery, log: RunLog) -> None:
        self._recovery, self._log = recovery, log

    def after_step(self, event: StepEvent) -> None:
        for line in self._recovery.poll(event.outcome.flags):
            self._log.say(line)
