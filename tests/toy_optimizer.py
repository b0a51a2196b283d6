"""A second optimizer, added as a contributor would: a section in the recipe's union and an entry of one table."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field

from megadistill.config.recipe import AdamWSection, OptimizerSection, Recipe, TrainSection
from megadistill.student.optimizer import OPTIMIZERS, OptimizerKind


class MomentumSection(OptimizerSection):
    kind: Literal["momentum"] = "momentum"
    """Name of the optimizer."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the running sum of gradients."""


MOMENTUM = OptimizerKind(
    build=lambda groups, section: torch.optim.SGD(groups, lr=0.0, momentum=section.momentum),
    state=("momentum_buffer",),
    gradient_mean="momentum_buffer",
    describe=lambda section: f"SGD, momentum {section.momentum:g}",
)
"""One state tensor, where AdamW has two, and no count of steps."""


@contextmanager
def toy_optimizer() -> Iterator[None]:
    """SGD with momentum as `train.optimizer.kind: momentum`, inside the context."""
    field = TrainSection.model_fields["optimizer"]
    OPTIMIZERS["momentum"] = MOMENTUM
    try:
        _rebuild(field, AdamWSection | MomentumSection)
        yield
    finally:
        del OPTIMIZERS["momentum"]
        _rebuild(field, AdamWSection)


def _rebuild(field: object, annotation: object) -> None:
    field.annotation = annotation  # type: ignore[attr-defined]
    for model in (TrainSection, Recipe):
        model.model_rebuild(force=True)
