"""Collectives over a run of replicas have the meaning of those over all of its ranks.

Legend: R replicas of n ranks, w = R·n. One launch a layout; the values of a rank are a function of its number, so that
each rank computes what the whole run must have.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.collectives import (
    all_gather_objects,
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    all_true,
    barrier,
    broadcast_from_first,
    broadcast_object,
    first_false,
    group_rank,
    group_size,
)
from megadistill.distributed.topology import Topology
from tests.ranks.harness import run_ranks

LAYOUTS = [(2, 2), (3, 2), (2, 1), (1, 2)]
"""(R, n)."""

CPU = torch.device("cpu")


def _values(rank: int, dtype: torch.dtype) -> Tensor:
    """[3, 2]: this rank's own; of integers, beyond those that float32 and float64 hold."""
    values = torch.arange(6, dtype=torch.int64).view(3, 2) + 1000 * rank
    if dtype == torch.bool:
        return values % 3 == rank % 3
    return values * (2**52 + 1) if dtype == torch.int64 else (values + 0.1).to(dtype)


def _object(rank: int) -> dict[str, Any]:
    """Of another size on each rank."""
    return {"rank": rank, "none": None, "text": "ä" * (1 + 100 * rank), "rows": torch.full((rank, 2), rank)}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return torch.equal(one["rows"], other["rows"]) and {**one, "rows": 0} == {**other, "rows": 0}


def _meanings(topology: Topology) -> dict[str, bytes]:
    """Compares each function with its one-level meaning; returns the bits of sums whose order is not given."""
    rank, world, group = topology.rank, topology.world, topology.world_group
    assert (group_rank(group), group_size(group)) == (rank, world)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        own = _values(rank, dtype)
        gathered = all_gather_rows(own, group)
        assert torch.equal(gathered, torch.cat([_values(each, dtype) for each in range(world)])), dtype
        assert torch.equal(own, _values(rank, dtype)), "the source is not written to"
    assert all_gather_rows(torch.empty(0, 3), group).shape == (0, 3)
    strided = torch.arange(8.0).view(2, 4).t() + rank
    assert torch.equal(all_gather_rows(strided, group), torch.cat([strided - rank + r for r in range(world)]))

    stacked = torch.stack([_values(each, torch.int64) for each in range(world)])
    own = _values(rank, torch.int64)
    assert all_reduce_sum(own, group) is own
    assert torch.equal(own, stacked.sum(dim=0))
    own = _values(rank, torch.int64) * (-1) ** rank
    largest = torch.stack([_values(each, torch.int64) * (-1) ** each for each in range(world)]).amax(dim=0)
    assert all_reduce_max(own, group) is own
    assert torch.equal(own, largest)
    assert all_reduce_sum(torch.tensor(float(rank)), group).item() == world * (world - 1) / 2, "of no dimension"

    for source in range(world):
        assert _same(broadcast_object(_object(rank), group, source=source), _object(source))
    objects = all_gather_objects(_object(rank), group)
    assert len(objects) == world
    assert all(_same(each, _object(other)) for other, each in enumerate(objects))
    assert all_gather_objects(None, group) == [None] * world

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
        tensor = _values(rank, dtype)
        broadcast_from_first(tensor, group)
        assert torch.equal(tensor, _values(0, dtype)), dtype
    broadcast_from_first(torch.empty(0), group)

    assert all_true(True, CPU, group)
    assert first_false(True, CPU, group) is None
    for failing in range(world):
        assert first_false(rank < failing, CPU, group) == failing, "the lowest of several"
        assert first_false(rank != failing, CPU, group) == failing
        assert not all_true(rank != failing, CPU, group)
    assert not all_true(False, CPU, group)
    return _bits(topology)


def _bits(topology: Topology) -> dict[str, bytes]:
    """Sums of numbers of many sizes, whose last bits depend on the order."""
    draw = torch.Generator().manual_seed(topology.rank)
    bits = {}
    for dtype in (torch.float32, torch.float64):
        values = torch.randn(1001, generator=draw, dtype=dtype) * 10 ** torch.randint(-6, 6, (1001,), generator=draw)
        single = all_gather_rows(values.unsqueeze(0), topology.world_group).double().sum(dim=0)
        summed = all_reduce_sum(values, topology.world_group)
        scale = 1e6 * torch.finfo(dtype).eps * topology.world
        torch.testing.assert_close(summed.double(), single, rtol=0, atol=50 * scale)
        bits[str(dtype)] = summed.numpy().tobytes()
    return bits


@pytest.mark.parametrize(("replicas", "shards"), LAYOUTS)
def test_a_collective_of_replicas_is_one_of_all_ranks(replicas: int, shards: int) -> None:
    """All ranks with one place in their replicas have the bits of a sum, or the replicas would drift apart."""
    by_rank = run_ranks(replicas * shards, _meanings, replicas=replicas)
    for place in range(shards):
        same = by_rank[place::shards]
        assert all(bits == same[0] for bits in same)


def _order(topology: Topology, path: str) -> list[int]:
    """Each rank leaves its mark before the barrier, and after it sees those of all ranks; several times in a row."""
    seen = []
    for turn in range(topology.world):
        if topology.rank == turn:
            time.sleep(0.2)
        (Path(path) / f"{turn}-{topology.rank}").touch()
        barrier(topology.world_group)
        seen.append(len(list(Path(path).glob(f"{turn}-*"))))
    return seen


def test_no_rank_leaves_a_barrier_before_the_last_has_come(tmp_path: Path) -> None:
    assert run_ranks(4, _order, str(tmp_path), replicas=2) == [[4] * 4] * 4
