"""Limits of an axis that single values do not spoil, and the values outside of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megadistill.report.run_record import Floats

Indices: TypeAlias = NDArray[np.int64]

MIDDLE = (5.0, 95.0)
"""Percentiles of a line between which its spread is measured."""
FENCE = 0.75
"""Distance from the middle, in spreads, beyond which a value is an outlier."""
LEAST_SPREAD = 0.05
"""Minimum of the spread, as a fraction of the middle value: a line that never moves has outliers too."""
LOG_RATIO = 8.0
"""Ratio of its high to its low values at which every line must arrive for a logarithmic axis."""
LOG_VALUES = 20
"""Minimum number of values of a line for a logarithmic axis."""
MARGIN = 0.05
MAX_MARKS = 20
"""Maximum marks of a line at one edge."""


@dataclass(frozen=True)
class Limits:
    """Limits of an axis."""

    low: float
    high: float
    log: bool = False

    def outside(self, values: Floats) -> tuple[Indices, Indices]:
        """Indices of values above and below, one at most of each of `MAX_MARKS` stretches: the farthest."""
        return _farthest(values - self.high), _farthest(self.low - values)


def axis_limits(lines: Sequence[Floats], *, from_zero: bool, may_be_log: bool) -> Limits:
    """Limits that hold the values of each line but its outliers.

    An outlier is farther from the middle 90 % of its line than `FENCE` times their spread: a first step, a spike.
    `lines` are finite values, at least one each.
    """
    log = may_be_log and all(_spans_decades(values) for values in lines)
    held = [_without_outliers(np.log10(values[values > 0]) if log else values) for values in lines]
    limits = _with_margin(held, from_zero=from_zero)
    return Limits(10**limits.low, 10**limits.high, log=True) if log else limits


def all_values(lines: Sequence[Floats], *, from_zero: bool) -> Limits:
    """Limits that hold every value."""
    return _with_margin([(float(each.min()), float(each.max())) for each in lines], from_zero=from_zero)


def _with_margin(held: Sequence[tuple[float, float]], *, from_zero: bool) -> Limits:
    low, high = min(low for low, _ in held), max(high for _, high in held)
    low = min(low, 0.0) if from_zero else low
    margin = MARGIN * (high - low) or MARGIN * abs(high) or 1.0
    return Limits(low if from_zero and low == 0 else low - margin, high + margin)


def _without_outliers(values: Floats) -> tuple[float, float]:
    first, middle, last = np.percentile(values, (MIDDLE[0], 50.0, MIDDLE[1]))
    reach = FENCE * max(last - first, LEAST_SPREAD * abs(middle))
    return max(float(values.min()), float(first - reach)), min(float(values.max()), float(last + reach))


def _spans_decades(values: Floats) -> bool:
    first, last = np.percentile(values, MIDDLE)
    return len(values) >= LOG_VALUES and first > 0 and last / first >= LOG_RATIO


def _farthest(excess: Floats) -> Indices:
    """Indices of the largest positive excess in each of up to `MAX_MARKS` stretches."""
    stretches = np.array_split(np.arange(len(excess)), min(len(excess), MAX_MARKS))
    farthest = [stretch[excess[stretch].argmax()] for stretch in stretches if len(stretch)]
    return np.array([place for place in farthest if excess[place] > 0], dtype=np.int64)
