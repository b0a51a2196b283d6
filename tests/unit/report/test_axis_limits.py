"""Axes that a first step or a spike does not spoil, with every value that they leave out."""

import numpy as np
import pytest

from megadistill.report.axis_limits import MAX_MARKS, all_values, axis_limits

NOISE = 1.0 + 0.1 * np.sin(np.arange(400.0))


@pytest.mark.parametrize("place", [0, 200], ids=["first step", "spike"])
def test_one_outlier_does_not_flatten_the_others(place: int) -> None:
    values = NOISE.copy()
    values[place] = 8.0
    limits = axis_limits([values], from_zero=False, may_be_log=False)
    others = np.delete(values, place)
    assert limits.low < others.min() < others.max() < limits.high
    assert np.ptp(others) > 0.5 * (limits.high - limits.low), "the others fill half of the axis"
    above, below = limits.outside(values)
    assert (above.tolist(), below.tolist()) == ([place], [])


def test_without_outliers_every_value_is_inside() -> None:
    falling = np.linspace(7.6, 3.3, 400)
    limits = axis_limits([NOISE, falling], from_zero=False, may_be_log=False)
    for values in (NOISE, falling):
        assert [each.tolist() for each in limits.outside(values)] == [[], []]


def test_few_values_are_all_inside() -> None:
    limits = axis_limits([np.array([8.0, 2.0])], from_zero=False, may_be_log=False)
    assert limits.low < 2.0
    assert limits.high > 8.0


def test_a_steep_beginning_leaves_room_for_the_rest() -> None:
    """As of a run of 10,000 steps, that begins at 10.8 nats and spends its life between 3.5 and 3."""
    steps = np.arange(10_000.0)
    loss = 3.0 + 0.5 * (1 - steps / 10_000) + 7.3 * np.exp(-steps / 50)
    limits = axis_limits([loss], from_zero=False, may_be_log=False)
    assert limits.high < 4.0
    above, _ = limits.outside(loss)
    assert above[0] == 0
    assert len(above) <= MAX_MARKS


def test_a_line_that_never_moves_has_outliers_too() -> None:
    values = np.ones(100)
    values[50] = 20.0
    assert axis_limits([values], from_zero=False, may_be_log=False).high < 2.0


def test_a_line_that_falls_by_a_decade_has_a_logarithmic_axis() -> None:
    falling = 4.0 * np.exp(-np.arange(400.0) / 100)
    limits = axis_limits([falling], from_zero=False, may_be_log=True)
    assert limits.log
    assert 0 < limits.low < falling.min()
    assert not axis_limits([falling], from_zero=False, may_be_log=False).log
    assert not axis_limits([falling, 3.0 + NOISE], from_zero=False, may_be_log=True).log, "which would be flattened"
    assert not axis_limits([falling - 1.0], from_zero=False, may_be_log=True).log, "negative values"


def test_an_axis_from_zero_begins_there() -> None:
    assert axis_limits([NOISE], from_zero=True, may_be_log=False).low == 0
    assert all_values([NOISE], from_zero=True).low == 0
    assert all_values([np.array([2.0, 100.0])], from_zero=False).high > 100
