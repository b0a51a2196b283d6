"""Which ranks are measured with each other: every neighbour, once, and nobody with two at a time."""

import pytest

from megadistill.distributed.measures.bandwidth import neighbours


@pytest.mark.parametrize("world", range(1, 10))
def test_every_neighbour_on_a_ring_is_met_once(world: int) -> None:
    rounds = neighbours(world, local_world=world)
    ring = {tuple(sorted((rank, (rank + 1) % world))) for rank in range(world)} if world > 1 else set()
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == sorted(ring)
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_each_rank_meets_its_like_on_the_next_node() -> None:
    between = {pair for pairs in neighbours(12, local_world=4)[2:] for pair in pairs}
    assert between == {(rank, rank + 4) for rank in range(8)} | {(rank, rank + 8) for rank in range(4)}
    for pairs in neighbours(12, local_world=4):
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert neighbours(4, local_world=1) == neighbours(4, local_world=4)  # a rank a node: the ring has them all
