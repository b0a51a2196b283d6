"""Rows of numbers, smoothed and thinned, against what a slow and plain loop says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.report.smoothing import COUNTS, TIMES, evenly, extremes, smooth, unit

ROWS = st.lists(st.floats(-100, 100), max_size=60)


@given(row=ROWS, width=st.integers(1, 25))
def test_a_smoothed_value_is_the_mean_around_it(row: list[float], width: int) -> None:
    drawn = smooth(np.array(row, dtype=np.float64), width)
    for place, value in enumerate(drawn):
        half = min(width // 2, place)
        around = row[place - half : place + half + 1]
        assert value == pytest.approx(sum(around) / len(around), abs=1e-9)


def test_the_first_value_is_not_smoothed_away() -> None:
    steep = np.exp(-np.arange(1000) / 5.0)
    assert smooth(steep, 101)[0] == 1.0


@given(row=st.lists(st.floats(-100, 100), min_size=1, max_size=400), limit=st.integers(2, 50))
def test_thinning_keeps_the_outline_within_its_limit(row: list[float], limit: int) -> None:
    values = np.array(row)
    places = extremes(values, limit)
    assert len(places) <= max(limit, 2)
    assert (np.diff(places) > 0).all()
    assert values[places].min() == values.min()
    assert values[places].max() == values.max()


def test_a_single_spike_of_a_million_values_stays() -> None:
    values = np.zeros(1_000_000)
    values[123_456] = 9.0
    places = extremes(values, 800)
    assert len(places) <= 800
    assert 123_456 in places


@given(count=st.integers(1, 500), limit=st.integers(2, 50))
def test_even_places_have_both_ends(count: int, limit: int) -> None:
    places = evenly(count, limit)
    assert places[0] == 0
    assert places[-1] == count - 1
    assert len(places) <= limit


def test_no_value_at_all() -> None:
    empty = np.array([])
    assert len(smooth(empty, 3)) == len(extremes(empty, 10)) == 0


def test_units_that_read_well() -> None:
    assert unit(3e6, COUNTS, "") == (1e6, "millions")
    assert unit(5.0, TIMES, "seconds") == (1.0, "seconds")
