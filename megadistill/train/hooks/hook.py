"""The interface of the hooks that the training loop runs after each step, in a fixed order."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train.setup.step_shape import StepShape
from megadistill.train.step import StepOutcome
from megadistill.types import Cursor


class Request(Enum):
    """A hook's request to the training loop, the same on all ranks."""

    SAVE = "save"
    """A checkpoint of this step, once all hooks have run."""
    SAVE_LOCAL = "save local"
    """A save of the local tier of this step, once all hooks have run."""
    STOP = "stop"
    """A checkpoint of this step, then the end of the attempt."""
    FINISH = "finish"
    """A checkpoint of this step, then the end of the run before its last step, by a rule of the recipe."""
    ROLL_BACK = "roll back"
    """Resume from an older checkpoint at once; the hooks behind this one do not run."""


@dataclass(frozen=True)
class StepEvent:
    """A step that was taken."""

    step: int
    """Number of the step; the first is 1."""
    outcome: StepOutcome
    learning_rate: float
    cursor: Cursor
    """The position in the stream behind the step's batch."""
    seconds: float
    data_seconds: float
    """Seconds of the step that this rank waited for data."""
    parts: StepSeconds
    """Seconds of the step's parts on this rank."""
    shape: StepShape
    """Shape of the step: that of its curriculum entry."""
    progress: int
    """Progress of the schedules: the step, or with `train.tokens` the tokens up to its end."""


class Hook(Protocol):
    """Runs after each step, on every rank."""

    def after_step(self, event: StepEvent) -> Request | None: ...
