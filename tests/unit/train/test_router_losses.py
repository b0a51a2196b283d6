"""The load of experts by hand, and the alarm for those that starve."""

import math
from typing import Any

import pytest
import torch

from megadistill.models.experts import RouterCoefs
from megadistill.student.routers import RouterSums
from megadistill.train.hooks.starved_experts import STARVED_STEPS, StarvedExperts
from megadistill.train.router_losses import ExpertLoad, RouterLosses, router_numbers
from megadistill.types import EXPERT_METRICS
from tests.unit.train.cases import topology

TOKENS_LE = torch.tensor([[4.0, 2.0, 2.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
"""Four tokens, of which each has two experts."""
PROBABILITIES_LE = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
SUMS = RouterSums(PROBABILITIES_LE, torch.tensor([2.0, 4.0]), TOKENS_LE)

AUX = (4 * (1.0 * 0.5 + 0.5 * 0.25 + 0.5 * 0.125) + 2.0) / 2
"""E · Σ f · P of the first layer; K = 2 of the second, whose load is even."""


def test_the_load_of_a_step_by_hand() -> None:
    load = ExpertLoad.of(router_numbers(SUMS).tolist(), (1, 4), valid_tokens=4.0)
    assert load.by_layer() == {"1": [2.0, 1.0, 1.0, 0.0], "4": [1.0, 1.0, 1.0, 1.0]}
    entropy = (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4)
    expected = (2.0, 0.0, (entropy + 1) / 2, 1 / 8, AUX, 3.0)
    assert load.summary() == pytest.approx(dict(zip(EXPERT_METRICS, expected, strict=True)))


def test_the_losses_of_a_step_with_one_micro_batch() -> None:
    losses = RouterLosses(RouterCoefs(aux=0.1, z=0.01), torch.tensor(4.0), topology(), load_LE=None)
    assert float(losses.loss(SUMS)) == pytest.approx(0.1 * AUX + 0.01 * 3.0)


def test_a_step_without_labels_has_no_load() -> None:
    idle = RouterSums(*(torch.zeros_like(each) for each in (PROBABILITIES_LE, SUMS.log_z_squared_L, TOKENS_LE)))
    summary = ExpertLoad.of(router_numbers(idle).tolist(), (1, 4), valid_tokens=1.0).summary()
    assert summary == {**dict.fromkeys(EXPERT_METRICS, 0.0), "idle": 1.0}


def _steps(alarm: StarvedExperts, tokens: list[list[float]], first: int) -> list[Any]:
    load = ExpertLoad((1, 4), tokens, aux_loss=2.0, z_loss=1.0)
    return [alarm.update(step, load) for step in range(first, first + STARVED_STEPS)]


def test_experts_that_starve_are_named_once_with_the_way_out() -> None:
    recovery: Any = None
    alarm = StarvedExperts(recovery, RouterCoefs(aux=0.001))
    even = [[10.0, 10.0, 10.0, 10.0]] * 2
    assert not any(_steps(alarm, even, 1))
    starved = [[20.0, 19.4, 0.6, 0.0], [10.0] * 4]
    *before, anomaly = _steps(alarm, starved, 101)
    assert not any(before), "a step alone says little"
    assert anomaly.event == "experts_starved"
    assert anomaly.line == (
        "step 200: 2 of 8 experts had less than 10% of an even share of the tokens of 100 steps, and hardly learn: "
        "layer 1 expert 3 (0.0%), layer 1 expert 2 (6.0%). Raise loss.router_aux_loss_coef from 0.001 (0.01 is usual), "
        "in a run that begins from a checkpoint of this one (run.begin_from) or from the start"
    )
    named = [{"layer": 1, "expert": 3, "load": 0.0}, {"layer": 1, "expert": 2, "load": 0.06}]
    assert anomaly.values == {"experts": named, "count": 2, "steps": STARVED_STEPS}
    assert not any(_steps(alarm, starved, 201)), "reported once"
    assert not any(_steps(alarm, even, 301))
    assert _steps(alarm, starved, 401)[-1].values["count"] == 2, "they had recovered"


def test_many_experts_that_starve_are_a_short_line() -> None:
    recovery: Any = None
    alarm = StarvedExperts(recovery, RouterCoefs(aux=0.02))
    load = ExpertLoad(tuple(range(40)), [[100.0] + [0.0] * 127] * 40, aux_loss=2.0, z_loss=1.0)
    anomaly = [alarm.update(step, load) for step in range(1, STARVED_STEPS + 1)][-1]
    assert anomaly is not None
    assert "5080 of 5120 experts had less" in anomaly.line
    assert "and 5077 more" in anomaly.line
    assert "Raise loss.router_aux_loss_coef from 0.02 or lower train.optimizer.learning_rate, in" in anomaly.line
    assert len(anomaly.line) < 400
    assert (anomaly.values["count"], len(anomaly.values["experts"])) == (5080, 64)
