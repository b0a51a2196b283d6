"""The cost of a replica's death, in numbers, from the parts of a restart; and what ties a run to its ranks."""

from typing import Any

import pytest

from megadistill.distributed.launch import Launch, SeparateReplica
from megadistill.errors import UserError
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import place
from megadistill.plan.replica_deaths import NO_DEATHS, NOTICE, ONE_NODE, Deaths, count_deaths, fixed_ranks
from megadistill.plan.restart import CHECKPOINT, CLEANUP, FAULT, GROUPS, GROUPS_OF_RANK
from megadistill.plan.throughput import MfuAssumption
from megadistill.train.setup.ranks_and_files import students_of
from tests.unit.plan.tiny import cluster, plan_input

PARTS = {FAULT: 45.0, CHECKPOINT: 7.0, "launch": 100.0, "process groups": 10.06}

FIXED: dict[str, tuple[dict[str, Any], str | None]] = {
    "colocated": ({}, None),
    "disaggregated": ({"placement": {"placement": "disaggregated", "ranks": 4}}, "teacher.placement"),
    "saves targets": (
        {"placement": {"save_targets": "/targets"}, "loss": {"targets": {"select": "top_k", "k": 8}}},
        "teacher.save_targets",
    ),
    "local saves": ({"checkpoint": {"local": {"folder": "/local", "every": 5}}}, "checkpoint.local"),
    "labels": ({"teacher": None}, None),
    "labels, local saves": (
        {"teacher": None, "checkpoint": {"local": {"folder": "/local", "every": 5}}},
        "checkpoint.local",
    ),
}


def _estimate(*, nodes: int, shard: int | None, **sections: Any) -> Estimate:
    """Twelve ranks on three nodes, or eight on two, of a network of 1 MB/s."""
    inputs, machines = plan_input(distributed={"shard": shard, "vocab_group": 2}, **sections), cluster(nodes, 4)
    return estimate(place(inputs.recipe, inputs, machines), machines, MfuAssumption())


def test_a_death_costs_a_pause_of_all_and_a_replica_until_the_replacement_has_joined() -> None:
    """Three replicas of four ranks. Groups of three members: 10 + 3 · 0.005 s, at the death and again when one joins,
    with the state: 12 bytes for each of 49,440 / 4 parameters (4 layers of 7,744, 288 rows of 32 twice, a norm).

    The replacement: all parts but the detection and the reading, with 15 s in which its ranks end; it is not the run
    that makes groups of 12 ranks, but it alone, of 4.
    """
    assert (NOTICE, GROUPS, GROUPS_OF_RANK, CLEANUP) == (10.0, 10.0, 0.005, 15.0)
    counted = _estimate(nodes=3, shard=4, teacher=None)
    deaths = count_deaths(counted, PARTS)
    state = 12 * 12_360 / 1e6
    assert deaths.pause == pytest.approx(10 + 10.015 + counted.times.step + 10.015 + state)
    assert deaths.replacement == pytest.approx(100 + 10.06 + 15 - 8 * 0.005)
    assert (deaths.share, deaths.replicas) == (ONE_NODE, 3)


def test_the_share_of_one_node_is_that_of_llama_3s_faults() -> None:
    """419 interruptions, without 54 of software, 9 of time-outs and dependencies, and 35 of the network."""
    assert pytest.approx((419 - 54 - 7 - 2 - 35) / 419) == ONE_NODE


def test_the_cost_is_shared_by_the_replicas_and_goodput_is_that_of_a_renewal() -> None:
    """10 s for all, and a fifth of 100 s: 30 s. A fault in 600 s, of which half are deaths: 600 / (600 + 0.5 · 30)."""
    deaths = Deaths(0.5, pause=10.0, replacement=100.0, replicas=5)
    assert deaths.cost == pytest.approx(30.0)
    assert deaths.goodput(600.0) == pytest.approx(600 / 615)
    assert NO_DEATHS.goodput(600.0) == 1.0


def test_one_copy_survives_nothing() -> None:
    assert count_deaths(_estimate(nodes=2, shard=None, teacher=None), PARTS) is NO_DEATHS


@pytest.mark.parametrize("case", FIXED)
def test_a_run_that_is_tied_to_its_ranks_is_the_one_that_separate_launches_refuse(case: str) -> None:
    sections, setting = FIXED[case]
    recipe = plan_input(**sections).recipe
    launch = Launch(0, 8, 0, 4, SeparateReplica(0, 2, "n1", 29600))
    if setting is None:
        assert fixed_ranks(recipe) is None
        students_of(recipe, launch)
        return
    named = fixed_ranks(recipe)
    assert named is not None
    assert named.partition("=")[0] == setting
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        students_of(recipe, launch)


def test_replicas_that_are_tied_to_their_ranks_do_not_survive_each_other() -> None:
    local: dict[str, Any] = {"checkpoint": {"local": {"folder": "/local", "every": 5}}}
    assert count_deaths(_estimate(nodes=2, shard=4, teacher=None, **local), PARTS) is NO_DEATHS
    assert count_deaths(_estimate(nodes=2, shard=4, teacher=None), PARTS).share > 0
