"""The order is a bijection an epoch, constant in memory, and never moves.

tests/golden/order.json is renewed with `RENEW_GOLDEN=1 pytest tests/unit/data/stream/test_shuffle.py`, together with
ORDER_VERSION and a Numerics line in the CHANGELOG: every stream that was begun before reads other data after it.
"""

import json
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.stream.shuffle import BLOCK, ORDER_VERSION, WINDOW, SourceOrder
from tests.paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "order.json"

CASES: list[dict[str, Any]] = [
    {"counts": [1], "seed": 0, "name": "data", "first": 0},
    {"counts": [3, 2], "seed": 1, "name": "data", "first": 3},
    {"counts": [500, 500, 137], "seed": 1, "name": "data", "first": 0},
    {"counts": [500, 500, 137], "seed": 2, "name": "web", "first": 1_137_000},
    {"counts": [4096] * 10_000, "seed": 20_240, "name": "data", "first": 10**12},
]


def _order(counts: list[int], seed: int, name: str = "data") -> SourceOrder:
    return SourceOrder(counts, seed=seed, name=name)


def _first(case: dict[str, Any]) -> Any:
    return _order(case["counts"], case["seed"], case["name"]).locate(np.arange(8) + case["first"]).tolist()


def test_golden_vectors() -> None:
    actual = {"order_version": ORDER_VERSION, "places": [_first(case) for case in CASES]}
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(actual) + "\n")
        pytest.fail(f"{GOLDEN} was renewed: run again without RENEW_GOLDEN")
    assert actual == json.loads(GOLDEN.read_text())


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_visits_every_sequence_once(counts: list[int], seed: int, epoch: int) -> None:
    sequences = sum(counts)
    places = _order(counts, seed).locate(np.arange(sequences) + epoch * sequences)
    expected = {(shard, sequence) for shard, count in enumerate(counts) for sequence in range(count)}
    assert len(places) == sequences
    assert {(shard, sequence) for shard, sequence in places.tolist()} == expected


@pytest.mark.parametrize("sequences", [*range(1, 300, 7), 63, 64, 65, 4095, 4096, 4097, 65_536, 65_537, 200_001])
def test_every_sequence_once_for_sizes_around_blocks_and_windows(sequences: int) -> None:
    assert np.array_equal(np.sort(_order([sequences], 5).sequence_at(np.arange(sequences))), np.arange(sequences))


def test_epochs_seeds_and_names_differ() -> None:
    n = 1000
    slots = np.arange(n)
    order = _order([n], 7)
    orders = [order.sequence_at(slots), order.sequence_at(slots + n), _order([n], 8).sequence_at(slots), slots]
    orders.append(_order([n], 7, "other").sequence_at(slots))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02, "two permutations of 1,000 agree in about one place"


def test_the_sequences_behind_the_last_block_are_others_in_each_epoch() -> None:
    n = 10 * BLOCK + 30
    order = _order([n], 7)
    last = [set(order.sequence_at(np.arange(10 * BLOCK, n) + epoch * n).tolist()) for epoch in range(8)]
    assert all(len(sequences) == 30 for sequences in last)
    assert len(set.union(*last)) > 120, "eight times 30 of 670, at random places"


def test_a_window_draws_its_blocks_from_everywhere_and_mixes_their_sequences() -> None:
    """The order is as far from sorted as independent draws: neighbours in the order are a third of the whole apart."""
    n = 4 * BLOCK * WINDOW
    sequences = _order([n], 3).sequence_at(np.arange(BLOCK * WINDOW))
    assert abs(np.abs(np.diff(sequences)).mean() / n - 1 / 3) < 0.01
    assert len(np.unique(sequences // BLOCK)) <= 2 * WINDOW, "whole blocks, which the shift cuts in two"


def test_a_batch_is_as_varied_as_one_of_a_shuffle_buffer() -> None:
    """Sequences of a shard resemble each other: the variance of a batch's mean, to that of independent draws (1.0)."""
    shard, shards, batch = 4096, 256, 256
    n = shard * shards
    sequences = _order([shard] * shards, 3).sequence_at(np.arange(n))
    values = np.random.default_rng(0).normal(size=shards)[sequences // shard]
    inflation = values.reshape(-1, batch).mean(axis=1).var() / (values.var() / batch)
    assert inflation < 2.5


def test_a_position_alone_is_the_position_in_a_batch_that_spans_epochs() -> None:
    order = _order([50, 60], 1)
    slots = np.arange(80, 400)
    together = order.locate(slots)
    assert np.array_equal(together, np.concatenate([order.locate(slots[i : i + 1]) for i in range(len(slots))]))
