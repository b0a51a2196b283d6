"""What a cursor says was read, against every slot located one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.stream.order import Order, Source, Stage
from megadistill.export.data_provenance import sequences_of
from megadistill.types import Cursor

SOURCES = {name: Source(fingerprint=name * 3, counts=(7, 30)) for name in ("books", "code", "web")}
STAGES = (
    Stage(23, {"web": 0.7, "code": 0.3}),
    Stage(10, {"web": 1, "books": 1, "code": 5}),
    Stage(None, {"books": 3, "web": 1}),
)
ORDER = Order(SOURCES, STAGES, seed=5)


def _cursor(next_slot: int, holes: tuple[int, ...] = (), skips: tuple[tuple[int, int], ...] = ()) -> Cursor:
    return Cursor(ORDER.fingerprint, next_slot, holes=holes, skips=skips)


def _located(slots: list[int]) -> dict[str, int]:
    found = Counter(ORDER.names[source] for source, _, _ in ORDER.locate(np.array(slots, dtype=np.int64)).tolist())
    return {name: found[name] for name in ORDER.names}


@settings(max_examples=60, deadline=None)
@given(next_slot=st.integers(0, 120), first=st.integers(0, 120), length=st.integers(1, 40), hole=st.integers(0, 119))
def test_sequences_of_each_source_are_those_of_the_slots(next_slot: int, first: int, length: int, hole: int) -> None:
    skipped = range(first, first + length)
    holes = (hole,) if hole < next_slot and hole not in skipped else ()
    read = [slot for slot in range(next_slot) if slot not in skipped and slot not in holes]
    cursor = _cursor(next_slot, holes, ((first, first + length),))
    assert sequences_of(ORDER.description, cursor) == _located(read)


@pytest.mark.parametrize("next_slot", [0, 23, 33, 34])
def test_a_cursor_at_the_end_of_a_stage_has_read_all_of_it(next_slot: int) -> None:
    assert sequences_of(ORDER.description, _cursor(next_slot)) == _located(list(range(next_slot)))
