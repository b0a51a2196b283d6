"""The interval between checkpoints: against simulated faults, published formulas and counted saves."""

import math
import random
from dataclasses import replace

import pytest

from megadistill.plan.checkpoint_interval import (
    LEAST_SECONDS,
    CheckpointAdvice,
    SaveCosts,
    advise,
    fault_seconds,
    round_steps,
)
from megadistill.plan.output.plan_json import to_json
from megadistill.plan.search import plan
from megadistill.plan.throughput import MfuAssumption
from tests.unit.plan.tiny import SLOWER, cluster, plan_input


def _simulated(costs: SaveCosts, interval: float, *, faults: int) -> float:
    """Goodput of a run with random faults: a segment counts when its save is whole."""
    chance, wall, useful = random.Random(0), 0.0, 0.0
    pending = 0.0
    for _ in range(faults):
        until = chance.expovariate(1 / costs.between_faults)
        clock = 0.0
        while clock + interval + costs.stall <= until:
            clock += interval + costs.stall
            pending = interval
            useful += interval
        if pending and until - clock < costs.write:  # the last save was being written
            useful -= interval
        pending = 0.0
        wall += until + costs.restart
    return useful / wall


@pytest.mark.parametrize(
    "costs",
    [
        SaveCosts(stall=0.1, write=1.0, restart=180.0, between_faults=10_800.0),
        SaveCosts(stall=20.0, write=60.0, restart=600.0, between_faults=10_800.0),
        SaveCosts(stall=5.0, write=0.0, restart=60.0, between_faults=2_000.0),
    ],
)
@pytest.mark.parametrize("interval", [60.0, 300.0, 900.0])
def test_goodput_is_that_of_simulated_faults(costs: SaveCosts, interval: float) -> None:
    assert costs.goodput(interval) == pytest.approx(_simulated(costs, interval, faults=4_000), abs=0.012)


@pytest.mark.parametrize("stall", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("between_faults", [3_600.0, 36_000.0, 360_000.0])
def test_dalys_interval_is_the_best_and_near_youngs(stall: float, between_faults: float) -> None:
    costs = SaveCosts(stall, 0.0, 180.0, between_faults)
    best = max(range(60, 40_000, 5), key=costs.goodput)
    assert costs.best == pytest.approx(best, rel=0.03)
    assert costs.best == pytest.approx(math.sqrt(2 * stall * between_faults), rel=0.1)


def test_saves_do_not_overlap_and_do_not_flood_the_storage() -> None:
    costs = SaveCosts(0.01, 5.0, 180.0, 10_800.0)
    assert costs.best == LEAST_SECONDS
    assert replace(costs, write=200.0).best == 200.01
    assert SaveCosts(10_000.0, 0.0, 1.0, 1_000.0).best == 10_000.0
    assert SaveCosts(1.0, 0.0, 1e9, 1.0).goodput(60.0) == 0.0


def test_the_fault_rate_is_llama_3s_by_gpus() -> None:
    assert fault_seconds(16_384) / 3600 == pytest.approx(3.09, abs=0.01)
    assert fault_seconds(4_096) / 3600 == pytest.approx(12.4, abs=0.05)


@pytest.mark.parametrize(
    ("steps", "rounded"), [(0.2, 1), (3.0, 2), (3.5, 5), (8.0, 10), (23.0, 25), (34.0, 25), (40.0, 50), (800.0, 1000)]
)
def test_steps_are_round(steps: float, rounded: int) -> None:
    assert round_steps(steps) == rounded


def _advice(own: int) -> CheckpointAdvice:
    return CheckpointAdvice(
        costs=SaveCosts(0.1, 1.0, 180.0, 10_800.0),
        restart_parts={},
        step=1.8,
        key="train.checkpoint_every",
        own=own,
        run_steps=480_000,
    )


def test_a_recipe_that_is_far_off_is_warned_of_and_a_near_one_not() -> None:
    assert _advice(500).every == 25
    warning = _advice(500).warning
    assert warning is not None
    assert warning.startswith("train.checkpoint_every=500 loses 3.")
    assert warning.endswith("by steps taken again after faults: 25 is better")
    assert _advice(50).warning is None
    slow = replace(_advice(5), costs=SaveCosts(5.0, 0.0, 180.0, 10_800.0)).warning
    assert slow is not None
    assert "by waiting for saves" in slow


def test_what_a_plan_counts_is_what_the_recipe_saves() -> None:
    inputs, machines = plan_input(), cluster(2, 4, slower=SLOWER)
    main = plan(inputs, machines, MfuAssumption()).main
    assert main is not None
    advice = advise(main)
    assert advice.costs.between_faults == fault_seconds(8)
    assert advice.costs.restart == sum(advice.restart_parts.values())
    assert advice.own == inputs.recipe.train.checkpoint_every
    assert set(advice.restart_parts) >= {"teacher", "checkpoint", "process groups"}
    recipe = inputs.recipe
    section = recipe.checkpoint.model_copy(update={"asynchronous": False})
    waits = replace(main.sharding, recipe=recipe.model_copy(update={"checkpoint": section}))
    stalled = advise(replace(main, sharding=waits)).costs
    assert stalled.stall == pytest.approx(advice.costs.stall + advice.costs.write)
    assert stalled.write == 0.0


def test_the_json_has_both_intervals_by_the_given_rate() -> None:
    result = plan(plan_input(), cluster(2, 4, slower=SLOWER), MfuAssumption())
    values = to_json(result, law=None, price=None, between_faults=7_200.0)["checkpoint_interval"]
    assert values["seconds_between_faults"] == 7_200.0
    assert values["advised_goodput"] >= values["goodput"] > 0
