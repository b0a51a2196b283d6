"""Curriculum, weights and epochs: shares hold at every prefix, sources continue, and edits are distinguished."""

import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.stream.order import (
    MAX_PERIOD,
    CurriculumEntry,
    Order,
    Source,
    interleave,
    order_differences,
    quotas,
)
from megadistill.data.stream.shuffle import SourceOrder
from megadistill.errors import UserError

SOURCES = {"code": Source("c" * 64, [40, 37]), "law": Source("e" * 64, [11]), "web": Source("a" * 64, [100, 30, 7])}
CURRICULUM = (
    CurriculumEntry(333, {"web": 0.7, "code": 0.3}),
    CurriculumEntry(100, {"web": 1, "code": 1, "law": 1}),
    CurriculumEntry(None, {"code": 0.25, "law": 0.75}),
)


@settings(max_examples=80)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_no_prefix_of_a_period_strays_by_a_whole_sequence(shares: list[int]) -> None:
    period = interleave(shares)
    assert np.bincount(period, minlength=len(shares)).tolist() == shares
    for source, share in enumerate(shares):
        given_ = np.cumsum(period == source)
        for slot, count in enumerate(given_.tolist(), 1):
            assert abs(count - Fraction(share * slot, sum(shares))) < 1


def test_weights_are_read_as_the_decimals_that_they_are_written_as() -> None:
    assert quotas({"web": 0.7, "code": 0.3}, entry=1) == {"code": 3, "web": 7}
    assert quotas({"web": 2, "code": 1.0}, entry=1) == {"code": 1, "web": 2}
    assert quotas({"web": 0.62, "code": 0.25, "law": 0.13}, entry=1) == {"code": 25, "law": 13, "web": 62}


def test_weights_without_a_short_period_are_rounded_and_none_is_lost() -> None:
    actual = quotas({"a": 1 / 3, "b": 2 / 3, "c": 1e-4}, entry=1)
    assert sum(actual.values()) == MAX_PERIOD
    assert actual["c"] == round(1e-4 / 1.0001 * MAX_PERIOD)
    with pytest.raises(UserError, match=r"in entry 4 the weight of c is 1e-06.*leave the source out"):
        quotas({"a": 1 / 3, "b": 2 / 3, "c": 1e-6}, entry=4)


def test_slots_are_dealt_by_hand() -> None:
    """Every slot of three curriculum entries, by walking them one by one."""
    order = Order(SOURCES, CURRICULUM, seed=3)
    total = 1000
    walkers = {name: SourceOrder(source.counts, seed=3, name=name) for name, source in SOURCES.items()}
    taken = dict.fromkeys(SOURCES, 0)
    expected, slot = [], 0
    for entry in CURRICULUM:
        names = sorted(SOURCES)
        shares = quotas(entry.weights, entry=1)
        period = interleave([shares.get(name, 0) for name in names])
        for place in range(entry.slots if entry.slots is not None else total - slot):
            name = names[period[place % len(period)]]
            shard, sequence = walkers[name].locate(np.array([taken[name]]))[0].tolist()
            expected.append([names.index(name), shard, sequence])
            taken[name] += 1
            slot += 1
    assert order.locate(np.arange(total)).tolist() == expected
    assert order.names == ("code", "law", "web")


def test_every_epoch_of_every_source_is_whole_through_the_stages() -> None:
    places = Order(SOURCES, CURRICULUM, seed=3).locate(np.arange(2000))
    for number, source in enumerate(SOURCES.values()):
        mine = places[places[:, 0] == number, 1:]
        sequences = sum(source.counts)
        for epoch in range(len(mine) // sequences):
            part = mine[epoch * sequences : (epoch + 1) * sequences]
            assert len(np.unique(part, axis=0)) == sequences


@pytest.mark.parametrize("slots", [0, 1, 332, 333, 334, 432, 433, 999])
def test_the_sequences_of_each_source_are_counted(slots: int) -> None:
    """As the slots are dealt, at and within the borders of the curriculum's entries."""
    order = Order(SOURCES, CURRICULUM, seed=3)
    dealt = order.locate(np.arange(slots))[:, 0]
    expected = {name: int((dealt == number).sum()) for number, name in enumerate(order.names)}
    assert order.sequences_read(slots) == expected


def _described(curriculum: Sequence[CurriculumEntry] = CURRICULUM, *, seed: int = 3, **sources: Source) -> Order:
    return Order({**SOURCES, **sources}, curriculum, seed=seed)


def test_stages_that_lie_in_the_future_may_be_edited() -> None:
    before = _described()
    law = Source("f" * 64, [500])
    edited = _described((CURRICULUM[0], CurriculumEntry(50, {"law": 1}), CurriculumEntry(None, {"web": 1})), law=law)
    assert order_differences(before.description, edited.description, next_slot=333) == []
    assert before.locate(np.arange(333)).tolist() == edited.locate(np.arange(333)).tolist()


def test_the_stage_under_way_may_end_elsewhere_in_the_future() -> None:
    before = _described()
    for slots in (200, 100_000):
        edited = _described((CurriculumEntry(slots, CURRICULUM[0].weights), CURRICULUM[2]))
        assert order_differences(before.description, edited.description, next_slot=200) == []
    shorter = _described((CurriculumEntry(199, CURRICULUM[0].weights), CURRICULUM[2]))
    actual = order_differences(before.description, shorter.description, next_slot=200)
    assert actual == [
        "curriculum entry 1 was code 3, web 7 parts, is code 3, web 7 parts for 199 sequences",
        "curriculum entry 2 was absent, is code 1, law 3 parts",
    ]


def test_what_was_read_is_compared_and_named() -> None:
    before = _described().description
    other = _described(
        (CurriculumEntry(333, {"web": 0.6, "code": 0.4}), *CURRICULUM[1:]), seed=4, web=Source("b" * 64, [100, 30, 7])
    ).description
    assert order_differences(before, other, next_slot=1) == [
        "the seed was 3, is 4",
        "source web was the manifest aaaaaaaaaaaa…, is bbbbbbbbbbbb…",
        "curriculum entry 1 was code 3, web 7 parts, is code 2, web 3 parts",
    ]
    assert order_differences(before, json.loads(json.dumps(before)), next_slot=10**9) == []


def test_a_trillion_tokens_take_no_memory() -> None:
    """488 million sequences of 2,048 tokens: address space is bounded to 64 MB over what an import takes."""
    program = """
import resource
import numpy as np
from megadistill.data.stream.order import Order, Source, CurriculumEntry
counts = [4096] * 119_210
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
order = Order({"a": Source("a", counts), "b": Source("b", counts)},
              [CurriculumEntry(10**8, {"a": 0.9, "b": 0.1}), CurriculumEntry(None, {"a": 0.5, "b": 0.5})], seed=1)
places = order.locate(np.arange(4 * 10**8, 4 * 10**8 + 256))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert places[:, 1].max() < 119_210 and len(np.unique(places, axis=0)) == 256
print(grown * 1024)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(output) < 64e6
