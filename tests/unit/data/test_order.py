"""The order is a bijection an epoch, constant in memory, and never moves.

tests/golden/order.json is renewed with `RENEW_GOLDEN=1 pytest tests/unit/data/test_order.py`, together with
ORDER_VERSION and a Numerics line in the CHANGELOG: every stream that was begun before reads other data after it.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.order import ORDER_VERSION, Order

GOLDEN = Path(__file__).parents[2] / "golden" / "order.json"

CASES: list[dict[str, Any]] = [
    {"counts": [1], "seed": 0, "first_slot": 0},
    {"counts": [3, 2], "seed": 1, "first_slot": 3},
    {"counts": [500, 500, 137], "seed": 1, "first_slot": 0},
    {"counts": [500, 500, 137], "seed": 2, "first_slot": 1_137_000},
    {"counts": [4096] * 10_000, "seed": 20_240, "first_slot": 10**12},
]


def _first(case: dict[str, Any]) -> Any:
    return Order(case["counts"], case["seed"]).locate(np.arange(8) + case["first_slot"]).tolist()


def test_golden_vectors() -> None:
    found = {"order_version": ORDER_VERSION, "places": [_first(case) for case in CASES]}
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(found) + "\n")
        pytest.fail(f"{GOLDEN} was renewed: run again without RENEW_GOLDEN")
    assert found == json.loads(GOLDEN.read_text())


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_visits_every_unit_once(counts: list[int], seed: int, epoch: int) -> None:
    units = sum(counts)
    places = Order(counts, seed).locate(np.arange(units) + epoch * units)
    expected = {(shard, unit) for shard, count in enumerate(counts) for unit in range(count)}
    assert len(places) == units
    assert {(shard, unit) for shard, unit in places.tolist()} == expected


def test_every_size_up_to_300_and_around_powers_of_four() -> None:
    for units in [*range(1, 301), 4095, 4096, 4097, 65_537]:
        assert np.array_equal(np.sort(Order([units], 5).unit_of(np.arange(units))), np.arange(units)), units


def test_epochs_and_seeds_differ() -> None:
    n = 1000
    slots = np.arange(n)
    order = Order([n], 7)
    orders = [order.unit_of(slots), order.unit_of(slots + n), Order([n], 8).unit_of(slots), slots]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02, "two permutations of 1,000 agree in about one place"


def test_neighbours_are_spread() -> None:
    """The mean distance of consecutive units is a third of the whole, as for a uniform permutation."""
    n = 100_000
    units = Order([n], 3).unit_of(np.arange(n))
    assert abs(np.abs(np.diff(units)).mean() / n - 1 / 3) < 0.01


def test_a_slot_alone_is_the_slot_in_a_batch_that_spans_epochs() -> None:
    order = Order([5, 6], 1)
    slots = np.arange(8, 40)
    together = order.locate(slots)
    assert np.array_equal(together, np.concatenate([order.locate(slots[i : i + 1]) for i in range(len(slots))]))


def test_far_slots_of_a_huge_set_need_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trillion tokens of 2,048, at slot 10^12: nothing as long as the 488 million units may be made."""
    order = Order([4096] * 119_210, 1)
    arange = np.arange(10**12, 10**12 + 256)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("an array over the units")

    for name in ("arange", "argsort", "random"):
        monkeypatch.setattr(np, name, refuse)
    places = order.locate(arange)
    assert places.shape == (256, 2)
    assert len({tuple(place) for place in places.tolist()}) == 256
    assert (places >= 0).all()
    assert places[:, 0].max() < 119_210
    assert places[:, 1].max() < 4096
