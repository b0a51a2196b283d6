"""Long series made fit to draw: smoothed, thinned, in readable units."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megadistill.report.run_record import Floats

SMOOTHED_SHARE = 50
"""Length of a run over the length of its smoothing window."""

COUNTS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def window(count: int) -> int:
    """Length of the smoothing window, in steps, of a run of `count` steps."""
    return max(1, count // SMOOTHED_SHARE)


def smooth(values: Floats, width: int) -> Floats:
    """Centred moving average of width `width` over the finite values; NaN where there are none.

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
    """Indices of at most `limit` values that keep the outline: the lowest and the highest of each stretch, in order."""
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
    """Up to `limit` of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, limit)).round().astype(np.int64))


def unit(largest: float, units: tuple[tuple[float, str], ...], smallest: str) -> tuple[float, str]:
    """Size and name of the unit in which `largest` is written."""
    return next(((size, name) for size, name in units if largest >= size), (1.0, smallest))


def count_text(value: float) -> str:
    """A count in three digits: 409,600 -> 410K."""
    size, letter = next(((size, name[0].upper()) for size, name in COUNTS if value >= size), (1.0, ""))
    return f"{value / size:.3g}{'K' if letter == 'T' and size == 1e3 else letter}"


def time_text(seconds: float) -> str:
    """A duration in its largest unit: 8,136 -> 2.26 h."""
    size, name = unit(seconds, TIMES, "seconds")
    return f"{seconds / size:.3g} {'min' if name == 'minutes' else name if name == 'days' else name[0]}"
