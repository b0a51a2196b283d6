"""Latency of small collectives, measured over the world and over groups of consecutive ranks."""

from megadistill.distributed.measures.group_latencies import Latencies, collective_latencies
from megadistill.distributed.topology import Topology
from tests.ranks.harness import run_ranks


def _latencies(topology: Topology) -> Latencies:
    return collective_latencies(topology, 2)


def test_every_rank_has_the_same_latencies_of_each_group() -> None:
    first, *others = run_ranks(4, _latencies)
    assert others == [first] * 3
    assert {name: set(by_ranks) for name, by_ranks in first.items()} == {"all_gather": {4, 2}, "all_reduce": {4, 2}}
    assert all(seconds > 0 for by_ranks in first.values() for seconds in by_ranks.values())


def test_a_rank_by_itself_measures_nothing() -> None:
    assert run_ranks(1, _latencies) == [{}]
