"""Time of a run's validations on held-out splits, by the seconds of a micro-step without its backward pass."""

from dataclasses import dataclass

from megadistill.config.recipe import ValidationSection
from megadistill.data import Manifest
from megadistill.errors import UserError
from megadistill.plan.estimate import Estimate


@dataclass(frozen=True)
class ValidationCost:
    """Cost of the validations of a run. Their memory is below that of a step: no activation is kept."""

    count: int
    """Validations of the run."""
    sequences: int
    """Sequences of a validation."""
    micro_batches: int
    """Micro-batches of a rank in a validation."""
    seconds: float
    """Seconds of a validation: of a micro-step without the student's backward pass for each micro-batch."""

    @property
    def total(self) -> float:
        """Seconds of all of them."""
        return self.count * self.seconds


def validation_cost(estimate: Estimate) -> ValidationCost | None:
    """The cost in a layout; None without validation, or where the length of a split is not known here."""
    recipe, times = estimate.sharding.recipe, estimate.times
    section = recipe.validation
    lengths = None if section is None else _lengths(section)
    if section is None or lengths is None:
        return None
    rows = recipe.train.micro_batch * (times.students // recipe.distributed.sequence)
    micro_batches = sum(-(-length // rows) for length in lengths)
    steps = estimate.sharding.steps
    count = 1 + steps // section.every + bool(steps % section.every)
    return ValidationCost(count, sum(lengths), micro_batches, micro_batches * (times.micro_step - times.backward))


def _lengths(section: ValidationSection) -> list[int] | None:
    """Sequences that are read of each split; None: a split is not here, and has no bound."""
    lengths = []
    for location in section.data.values():
        try:
            length = Manifest.load(location).sequences
        except UserError:
            if section.sequences is None:
                return None
            length = section.sequences
        lengths.append(length if section.sequences is None else min(length, section.sequences))
    return lengths
