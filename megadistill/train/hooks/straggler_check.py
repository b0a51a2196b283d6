"""Reports ranks that compute or read slower than the others."""

from megadistill.distributed.topology import Topology
from megadistill.events import EventLog
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.stragglers import Stragglers


class StragglerCheck:
    """Compares the ranks every `every` steps. Construction is collective."""

    def __init__(self, events: EventLog, topology: Topology, *, every: int) -> None:
        self._events, self._every = events, every
        self._stragglers = Stragglers(topology)
        self._data_seconds = 0.0

    def after_step(self, event: StepEvent) -> None:
        self._data_seconds += event.data_seconds
        if event.step % self._every:
            return
        for line in self._stragglers.check(self._data_seconds):
            self._events.warn("straggler", f"step {event.step}: {line}", step=event.step, message=line)
        self._data_seconds = 0.0
