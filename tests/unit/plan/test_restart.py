"""Seconds from a fault to the next step, part by part, against numbers that are reckoned by hand."""

from dataclasses import replace
from typing import Any

import pytest

from megadistill.plan.checkpoint_interval import advise
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import place
from megadistill.plan.restart import CHECKPOINT, FAULT, restart_parts, storage_rate
from megadistill.plan.throughput import MfuAssumption
from tests.unit.plan.tiny import cluster, plan_input

LOCAL: dict[str, Any] = {"checkpoint": {"local": {"folder": "/local", "every": 5}}}


def _estimate(*, nodes: int = 2, shard: int | None = None, **sections: Any) -> Estimate:
    """Nodes of four ranks, whose network has 1 MB/s."""
    inputs, machines = plan_input(distributed={"shard": shard, "vocab_group": 2}, **sections), cluster(nodes, 4)
    return estimate(place(inputs.recipe, inputs, machines), machines, MfuAssumption())


def _of_size(counted: Estimate, size: int) -> Estimate:
    return replace(counted, requirements=replace(counted.requirements, checkpoint_bytes=size))


def test_a_node_reads_2_gb_a_second_and_all_together_100() -> None:
    assert storage_rate(4, 8) == storage_rate(8, 8) == 2e9
    assert storage_rate(9, 8) == storage_rate(16, 8) == 4e9
    assert storage_rate(50 * 8, 8) == storage_rate(512 * 8, 8) == 100e9


def test_a_restart_has_these_parts() -> None:
    """Groups: 10 s, and 5 ms for each of 8 ranks."""
    parts = restart_parts(_estimate(teacher=None))
    assert list(parts) == [FAULT, "node checks, launch, imports", "process groups", CHECKPOINT, "first step"]
    assert parts[FAULT] == 30 + 15
    assert parts["node checks, launch, imports"] == 45
    assert parts["process groups"] == pytest.approx(10.04)
    assert parts["first step"] == 30


def test_one_copy_hashes_and_reads_its_checkpoint_by_all_ranks() -> None:
    """8 GB on two nodes, of 2 GB/s each: 2 s, twice."""
    assert restart_parts(_of_size(_estimate(teacher=None), 8_000_000_000))[CHECKPOINT] == pytest.approx(2 + 2)


def test_of_two_replicas_one_reads_and_sends_each_shard_to_its_place_in_the_other() -> None:
    """8 GB: hashed by two nodes in 2 s, read by one in 4 s; a quarter of it over a network of 1 MB/s: 2,000 s."""
    parts = restart_parts(_of_size(_estimate(teacher=None, shard=4), 8_000_000_000))
    assert parts[CHECKPOINT] == pytest.approx(2 + 4 + 2_000)


def test_local_saves_are_hashed_and_read_by_each_replica_from_its_nodes() -> None:
    """8 GB from the disks of two nodes, of 2 GB/s each: 2 s, twice; of two replicas twice as many bytes."""
    whole = restart_parts(_of_size(_estimate(teacher=None, **LOCAL), 8_000_000_000))
    assert whole[CHECKPOINT] == pytest.approx(2 + 2)
    halves = restart_parts(_of_size(_estimate(teacher=None, shard=4, **LOCAL), 8_000_000_000))
    assert halves[CHECKPOINT] == pytest.approx(4 + 4)


def test_a_teacher_is_read_once_and_sent_to_the_other_nodes() -> None:
    """Its larger stage: 2 layers of 7,744 parameters and 250 rows of 32, in 4 bytes: 93,952 bytes, over 1 MB/s. The
    other has a norm instead of rows: 62,080. Both are read by the ranks of one node, which where there is only one
    have nobody to send to.
    """
    two, one = _estimate(nodes=2, shard=4), _estimate(nodes=1)
    assert two.sharding.stages == one.sharding.stages == 2
    read = (93_952 + 62_080) / 2e9
    assert restart_parts(two)["teacher"] == pytest.approx(read + 93_952 / 1e6)
    assert restart_parts(one)["teacher"] == pytest.approx(read)


def test_stages_over_several_nodes_are_read_by_each_of_them() -> None:
    """A vocab group of four on four nodes of one rank: a stage each, so all nodes read, and none has to send."""
    inputs, machines = plan_input(distributed={"vocab_group": 4}), cluster(4, 1)
    four = estimate(place(inputs.recipe, inputs, machines), machines, MfuAssumption())
    assert four.sharding.stages == 4
    assert restart_parts(four)["teacher"] == pytest.approx((93_952 + 62_080) / (4 * 2e9))


@pytest.mark.parametrize(("shard", "write", "stall"), [(None, 2.0, 0.1 + 0.1), (4, 4.0, 0.1 + 0.2)])
def test_a_save_is_one_replicas(shard: int | None, write: float, stall: float) -> None:
    """8 GB by two nodes in 2 s, by one of two replicas in 4 s; to the host at 10 GB/s, by 8 ranks 0.1 s, by 4 0.2 s."""
    costs = advise(_of_size(_estimate(teacher=None, shard=shard), 8_000_000_000)).costs
    assert costs.write == pytest.approx(write)
    assert costs.stall == pytest.approx(stall)


def test_local_saves_are_of_each_replica_and_twice() -> None:
    """8 GB and the copy of a neighbour on the disks of two nodes of 2 GB/s: 4 s; of two replicas: 8 s."""
    whole, halves = (
        advise(_of_size(_estimate(teacher=None, shard=each, **LOCAL), 8_000_000_000)) for each in (None, 4)
    )
    assert whole.costs.write == pytest.approx(4.0)
    assert halves.costs.write == pytest.approx(8.0)
