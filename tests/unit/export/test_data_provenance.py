"""Data provenance from a cursor, against every slot located one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.stream.order import CurriculumEntry, Order, Source
from megadistill.export.data_provenance import sequences_of
from megadistill.types import Cursor

SOURCES = {name: Source(fingerprint=name * 3, counts=(7, 30)) for name in ("books", "code", "web")}
CURRICULUM = (
    CurriculumEntry(23, {"web": 0.7, "code": 0.3}),
    CurriculumEntry(10, {"web": 1, "books": 1, "code": 5}),
    CurriculumEntry(None, {"books": 3, "web": 1}),
)
ORDER = Order(SOURCES, CURRICULUM, seed=5)


def _cursor(next_slot: int, masked: tuple[int, ...] = (), skips: tuple[tuple[int, int], ...] = ()) -> Cursor:
    return Cursor(ORDER.fingerprint, next_slot, masked_slots=masked, skips=skips)


def _located(slots: list[int]) -> dict[str, int]:
    counts = Counter(ORDER.names[source] for source, _, _ in ORDER.locate(np.array(slots, dtype=np.int64)).tolist())
    return {name: counts[name] for name in ORDER.names}


@settings(max_examples=60)
@given(
    next_slot=st.integers(0, 120), first=st.integers(0, 120), length=st.integers(1, 40), masked_at=st.integers(0, 119)
)
def test_sequences_by_source_are_those_of_the_slots(next_slot: int, first: int, length: int, masked_at: int) -> None:
    skipped = range(first, first + length)
    masked = (masked_at,) if masked_at < next_slot and masked_at not in skipped else ()
    read = [slot for slot in range(next_slot) if slot not in skipped and slot not in masked]
    cursor = _cursor(next_slot, masked, ((first, first + length),))
    assert sequences_of(ORDER.description, cursor) == _located(read)


@pytest.mark.parametrize("next_slot", [0, 23, 33, 34])
def test_a_cursor_at_the_end_of_a_stage_has_read_all_of_it(next_slot: int) -> None:
    assert sequences_of(ORDER.description, _cursor(next_slot)) == _located(list(range(next_slot)))
