"""The typed recipe, how it is read, and the table of its keys."""

from megadistill.config.load import dotted, load_recipe, refuse_renamed, validate_recipe
from megadistill.config.recipe import (
    CheckpointSection,
    DataSection,
    LossSection,
    OptimizerSection,
    Recipe,
    ResilienceSection,
    ScheduleSection,
    Section,
    StudentSection,
    TargetsSection,
    TeacherSection,
    TrainSection,
)

__all__ = [
    "CheckpointSection",
    "DataSection",
    "LossSection",
    "OptimizerSection",
    "Recipe",
    "ResilienceSection",
    "ScheduleSection",
    "Section",
    "StudentSection",
    "TargetsSection",
    "TeacherSection",
    "TrainSection",
    "dotted",
    "load_recipe",
    "refuse_renamed",
    "validate_recipe",
]
