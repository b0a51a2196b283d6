"""Reports ranks that compute or read slower than the others."""

from megadistill.distributed.topology import Topology
from megadistill.events import EventLog
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.stragglers import Stragglers
from megadistill.train.telemetry.metrics import RunLog


class StragglerCheck:
    """Compares the ranks every `every` steps. Construction is collective."""

    def __init__(self, events: EventLog, log: RunLog, topology: Topology, *, every: int) -> None:
        self._events, self._log, self._every = events, log, every
        self._stragglers = Stragglers(topology)
        self._data_seconds = 0.0

    def after_step(self, event: StepEvent) -> None:
        self._data_seconds += event.data_seconds
        if event.step % self._every:
            return
        for line in self._stragglers.check(self._data_seconds):
            self._events.write("straggler", step=event.step, message=line)
            self._log.say(f"step {event.step}: {line}")
        self._data_seconds = 0.0
