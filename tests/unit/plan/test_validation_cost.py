"""The cost of validations: their number, the micro-batches of a rank, and the forward passes of a micro-step."""

from pathlib import Path

import pytest

from megadistill.config.recipe import ValidationSection
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import place
from megadistill.plan.throughput import MfuAssumption
from megadistill.plan.validation_cost import ValidationCost, validation_cost
from tests.unit.data.splits import random_sequences, write_split
from tests.unit.plan.tiny import cluster, plan_input


def _estimate(validation: ValidationSection | None) -> Estimate:
    inputs, machines = plan_input(), cluster()
    recipe = inputs.recipe.model_copy(update={"validation": validation})
    return estimate(place(recipe, inputs, machines), machines, MfuAssumption())


def _cost(validation: ValidationSection) -> ValidationCost | None:
    return validation_cost(_estimate(validation))


def test_a_validation_is_so_many_micro_steps_without_their_backward_pass(tmp_path: Path) -> None:
    write_split(tmp_path / "web", random_sequences(50, seed=1))
    data = {"web": str(tmp_path / "web" / "manifest.json"), "elsewhere": "nowhere/manifest.json"}
    section = ValidationSection(every=7, data=data, sequences=40)
    result = _estimate(section)
    cost = validation_cost(result)
    assert cost is not None
    rows, steps = result.sharding.recipe.train.micro_batch * result.times.students, result.sharding.steps
    assert cost.sequences == 80
    assert cost.micro_batches == 2 * -(-40 // rows)
    assert cost.count == len({0, *range(7, steps + 1, 7), steps})
    assert cost.seconds == pytest.approx(cost.micro_batches * (result.times.micro_step - result.times.backward))
    assert 0 < cost.seconds < cost.micro_batches * result.times.micro_step
    assert cost.total == pytest.approx(cost.count * cost.seconds)


def test_a_split_that_is_not_here_has_a_cost_by_its_bound_alone() -> None:
    data = {"elsewhere": "nowhere/manifest.json"}
    assert _cost(ValidationSection(every=7, data=data)) is None
    assert _cost(ValidationSection(every=7, data=data, sequences=5)) is not None
    assert validation_cost(_estimate(None)) is None
