"""Slow ranks, from times alone, and the timed product."""

import pytest
import torch

from megadistill.train.resilience import stragglers
from megadistill.train.resilience.stragglers import IN_A_ROW, MAX_NAMED, Stragglers, product_seconds, slow, starved
from tests.unit.train.cases import topology


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ([1.0, 1.0, 1.29, 1.0], set()),
        ([1.0, 1.1, 1.61, 0.9], {2}),
        ([2.0, 1.0], {0}),
        ([1.0], set()),
        ([1.0, 9.0, 9.0, 1.0, 1.0], {1, 2}),
        ([0.1, 1.0, 1.0], set()),
    ],
)
def test_slow_is_much_slower_than_the_median(seconds: list[float], named: set[int]) -> None:
    assert slow(seconds) == named


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        ([0.0, 0.09, 0.0], set()),
        ([0.01, 0.5, 0.02], {1}),
        ([0.5, 0.5, 0.55], set()),
        ([0.3, 0.3, 0.5], {2}),
    ],
)
def test_starved_waits_for_data_more_than_the_others(shares: list[float], named: set[int]) -> None:
    assert starved(shares) == named


def test_a_rank_is_reported_at_every_third_consecutive_check(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Stragglers(topology())
    is_slow = [1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    counts = []
    for each in is_slow:
        monkeypatch.setattr(stragglers, "slow", lambda seconds, each=each: {0} if each else set())
        counts.append(len(ranks.check(0.0)))
    assert IN_A_ROW == 3
    assert counts == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]


def test_the_product_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert 0 < product_seconds(torch.device("cpu")) < 10
    assert torch.equal(torch.get_rng_state(), before)


def test_half_of_a_large_world_is_counted_and_the_slowest_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    world, waits = 4096, 0.01
    seconds = torch.ones(world)
    seconds[: world // 3] = torch.linspace(2.0, 3.0, world // 3)
    monkeypatch.setattr(stragglers, "all_gather_objects", lambda own, group: [f"n{rank // 8}" for rank in range(world)])
    gathered = torch.stack((seconds, torch.full((world,), waits)), dim=1).double()
    monkeypatch.setattr(stragglers, "all_gather_rows", lambda own, group: gathered)
    ranks = Stragglers(topology(world=world))
    lines = [ranks.check(0.0) for _ in range(IN_A_ROW)]
    assert lines[:-1] == [[], []]
    assert len(lines[-1]) == MAX_NAMED + 1
    assert lines[-1][0] == "straggler: rank 1364 (n170) computes at 0.33 of the median speed"
    assert lines[-1][-1] == f"straggler: {world // 3 - MAX_NAMED} more ranks compute slower than the median"
