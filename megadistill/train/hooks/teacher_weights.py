"""Compares the teacher's weights in memory with what was loaded."""

from megadistill.distributed.topology import Topology
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.sdc import FrozenWeights


class TeacherWeightsCheck:
    """Hashes this rank's part of the teacher every `every` steps."""

    def __init__(self, frozen: FrozenWeights, topology: Topology, *, every: int) -> None:
        self._frozen, self._topology, self._every = frozen, topology, every

    def after_step(self, event: StepEvent) -> None:
        """
        Raises:
            OperatorFault: a bit has changed on one of the ranks.
        """
        if event.step % self._every == 0:
            self._frozen.require_unchanged(self._topology)
