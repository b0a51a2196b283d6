"""The harness itself: results in rank order, a failing rank's traceback, a waiting rank ended."""

import pytest
import torch

from megadistill.distributed.collectives import (
    all_gather_objects,
    all_gather_rows,
    all_reduce_sum,
    all_true,
    first_false,
    reduce_scatter_rows,
    scatter_rows,
)
from megadistill.distributed.topology import Topology
from tests.ranks.harness import run_ranks


def _rank(topology: Topology) -> int:
    return topology.rank


def _fail_on_one(topology: Topology) -> None:
    if topology.rank == 1:
        raise ValueError("rank one fails")
    all_reduce_sum(torch.ones(1), topology.world_group)


def _collectives(topology: Topology) -> dict[str, torch.Tensor]:
    g, r = topology.group_size, topology.group_rank
    rows = torch.arange(g * 2, dtype=torch.float64).reshape(-1, 1) + 100 * topology.rank
    whole = torch.arange(g * 3).reshape(-1, 1) if r == g - 1 else None
    return {
        "gather": all_gather_rows(rows[:2], topology.vocab_group),
        "reduce_scatter": reduce_scatter_rows(rows, topology.vocab_group),
        "scatter": scatter_rows(whole, torch.empty(3, 1, dtype=torch.int64), g - 1, topology.vocab_group),
        "strided": all_reduce_sum(torch.tensor([topology.rank]), topology.slice_group),
    }


def test_results_come_in_rank_order() -> None:
    assert run_ranks(3, _rank) == [0, 1, 2]


def test_a_failing_rank_is_the_failure_and_nobody_waits() -> None:
    with pytest.raises(AssertionError, match="rank one fails"):
        run_ranks(2, _fail_on_one)


def _flags(topology: Topology) -> tuple[list[str], list[int | None], bool]:
    group, device = topology.world_group, topology.device
    texts = all_gather_objects("é" * topology.rank, group)
    lowest = [first_false(topology.rank < limit, device, group) for limit in range(topology.world + 1)]
    return texts, lowest, all_true(topology.rank < topology.world, device, group)


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_knows_the_texts_of_all_and_the_first_that_failed(world: int) -> None:
    expected = ["é" * rank for rank in range(world)], [*range(world), None], True
    assert run_ranks(world, _flags) == [expected] * world


@pytest.mark.parametrize(("world", "p"), [(1, 1), (2, 2), (4, 2), (4, 1)])
def test_collectives_against_their_meaning(world: int, p: int) -> None:
    for rank, results in enumerate(run_ranks(world, _collectives, vocab_group=p)):
        first, place = rank - rank % p, rank % p
        group = range(first, first + p)
        blocks = [torch.arange(p * 2, dtype=torch.float64).reshape(-1, 1) + 100 * r for r in group]
        assert torch.equal(results["gather"], torch.cat([block[:2] for block in blocks]))
        total = torch.stack(blocks).sum(0)
        assert torch.equal(results["reduce_scatter"], total[place * 2 : place * 2 + 2])
        assert results["scatter"].flatten().tolist() == list(range(place * 3, place * 3 + 3))
        assert results["strided"].item() == sum(range(place, world, p))
