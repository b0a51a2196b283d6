"""A slow rank among real ones: named by all of them alike, with its host."""

import socket

from megadistill.distributed.topology import Topology
from megadistill.train.resilience import stragglers
from megadistill.train.resilience.stragglers import IN_A_ROW, Stragglers
from tests.ranks.harness import run_ranks


def _checks(topology: Topology) -> list[list[str]]:
    """Rank 1 takes longer for the product, rank 2 waits for its data all the time."""
    stragglers.product_seconds = lambda device: 0.0016 if topology.rank == 1 else 0.001
    ranks = Stragglers(topology)
    return [ranks.check(60.0 if topology.rank == 2 else 0.0) for _ in range(IN_A_ROW)]


def test_every_rank_names_the_slow_ones() -> None:
    first, *others = run_ranks(3, _checks)
    assert all(each == first for each in others)
    *before, (slow, starved) = first
    assert before == [[]] * (IN_A_ROW - 1), "not before the third check"
    assert slow == f"straggler: rank 1 ({socket.gethostname()}) computes at 0.62 of the median speed"
    assert starved.startswith(f"straggler: rank 2 ({socket.gethostname()}) waits for data ")
    assert starved.endswith(" of its time, the median rank 0%")
