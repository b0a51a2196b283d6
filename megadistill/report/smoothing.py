"""Room `report`: a long row of numbers made fit to draw: smoothed, thinned, in readable units. It knows no run."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megadistill.report.run_record import Floats

SMOOTHED_SHARE = 50
"""A smoothed value is the mean over this part of a run's steps."""

COUNTS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def window(count: int) -> int:
    """Steps of a smoothed value, for a run of `count` steps."""
    return max(1, count // SMOOTHED_SHARE)


def smooth(values: Floats, width: int) -> Floats:
    """The mean of the finite values among the `width` around each; NaN where there is none.

    The window shrinks towards the first value, evenly on both sides, so that a steep beginning is not flattened; at the
    end it loses the part that is not there yet.
    """
    count = len(values)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(count)
    half = np.minimum(width // 2, place)
    first, stop = place - half, np.minimum(place + half + 1, count)
    known = counts[stop] - counts[first]
    return np.where(known > 0, (sums[stop] - sums[first]) / np.maximum(known, 1), np.nan)


def extremes(values: Floats, limit: int) -> NDArray[np.int64]:
    """Places of at most `limit` values that keep the outline: of each stretch the lowest and the highest, in order."""
    count, stretches = len(values), max(1, limit // 2)
    if count <= 2 * stretches:
        return np.arange(count)
    bounds = np.linspace(0, count, stretches + 1).astype(np.int64)
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    places = [
        begin + place
        for begin, end in pairwise(bounds)
        for place in {int(low[begin:end].argmin()), int(high[begin:end].argmax())}
    ]
    return np.sort(np.asarray(places, dtype=np.int64))


def evenly(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` of `count` places, with the first and the last."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, limit)).round().astype(np.int64))


def unit(largest: float, units: tuple[tuple[float, str], ...], smallest: str) -> tuple[float, str]:
    """The unit in which `largest` reads well: its size, and its name."""
    return next(((size, name) for size, name in units if largest >= size), (1.0, smallest))


def count_text(value: float) -> str:
    """A count in three digits: 409,600 -> 410K."""
    size, letter = next(((size, name[0].upper()) for size, name in COUNTS if value >= size), (1.0, ""))
    return f"{value / size:.3g}{'K' if letter == 'T' and size == 1e3 else letter}"


def time_text(seconds: float) -> str:
    """A stretch of time in its readable unit: 8,136 -> 2.26 h."""
    size, name = unit(seconds, TIMES, "seconds")
    return f"{seconds / size:.3g} {'min' if name == 'minutes' else name if name == 'days' else name[0]}"
