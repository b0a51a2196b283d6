"""The point from which a run continues with other replicas: between two steps, with the models in its ranks' memory.

A step counts when the optimizer has taken it. What was begun of the next one is dropped, with its gradients.
"""

import time
from dataclasses import dataclass, field

from megadistill.distributed.collectives import RunGroup, broadcast_object
from megadistill.distributed.members import Epoch
from megadistill.distributed.topology import Topology
from megadistill.student.engine import StudentEngine
from megadistill.train.checkpoint.format import ParentRecord
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.teacher.protocol import Teacher
from megadistill.types import Cursor

NO_STEPS = -1
"""Steps of a student that has no state."""


@dataclass
class ResumePoint:
    """State that a rank takes from one epoch of the run's replicas into the next one."""

    epoch: Epoch | None = None
    """The epoch; None for a run whose replicas, if it has any, end together."""
    began: float = field(default_factory=time.perf_counter)
    """When it was asked for."""
    models: tuple[StudentEngine, Teacher] | None = None
    steps: int = NO_STEPS
    """Steps that the student in memory has taken."""
    cursor: Cursor | None = None
    tokens: int = 0
    """Tokens of all steps."""
    parents: tuple[ParentRecord, ...] = ()
    event: StepEvent | None = None
    """The last step, as a replica that took it has it for the log."""
    is_unsaved: bool = False
    """Whether a save is due, or was under way, that no longer is."""

    def took(self, event: StepEvent, tokens: int, *, is_due: bool) -> None:
        """The student has taken a step. `is_due`: for a save."""
        self.reached(event.step, event.cursor, tokens)
        self.event, self.is_unsaved = event, is_due

    def reached(self, steps: int, cursor: Cursor | None, tokens: int) -> None:
        """The student has taken these steps, in all."""
        self.steps, self.cursor, self.tokens, self.event, self.is_unsaved = steps, cursor, tokens, None, False

    def lose_state(self) -> None:
        """The student's state is about to be replaced."""
        self.steps = NO_STEPS

    @property
    def has_state(self) -> bool:
        """Whether a replica of this epoch has a state to go on with; the same on every rank."""
        return self.epoch is not None and self.epoch.members[self.epoch.furthest].steps > NO_STEPS

    def take_over(self, student: StudentEngine, topology: Topology) -> None:
        """Gives every replica the state of the one that is furthest. Collective.

        Raises:
            ReplicasChanged: a replica is lost; those that had a state have it still.
        """
        assert self.epoch is not None, "the replicas of this run end together"
        source, group = self.epoch.furthest, topology.world_group
        values = (self.steps, self.cursor, self.tokens, self.parents, self.event, self.is_unsaved)
        values = broadcast_object(values, group, source=source * topology.shard_world)
        if self.epoch.needs_state:
            assert isinstance(group, RunGroup)
            if topology.replica != source:
                self.lose_state()
            student.state.receive(group, source=source)
        self.steps, self.cursor, self.tokens, self.parents, self.event, self.is_unsaved = values
