"""Long series made fit to draw: smoothed, thinned, in readable units."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megadistill.report.run_record import Floats

SMOOTHED_SHARE = 50
"""Length of a run over the length of its smoothing window."""

COUNTS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def smooth(values: Floats, width: int) -> Floats:
    """Centred moving average of width `width` over finite values.

    The window shrinks towards the first value, evenly on both sides, so that a steep beginning is not flattened; at the
    end it loses the part that is not there yet.
    """
    sums, place = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    half = np.minimum(width // 2, place)
    first, stop = place - half, np.minimum(place + half + 1, len(values))
    mean: Floats = (sums[stop] - sums[first]) / (stop - first)
    return mean


def extremes(values: Floats, limit: int) -> NDArray[np.int64]:
    """Indices of at most `limit` finite values that keep the outline: the lowest and the highest of each stretch."""
    count, stretches = len(values), max(1, limit // 2)
    if count <= 2 * stretches:
        return np.arange(count)
    bounds = np.linspace(0, count, stretches + 1).astype(np.int64)
    places = [
        begin + place
        for begin, end in pairwise(bounds)
        for place in {int(values[begin:end].argmin()), int(values[begin:end].argmax())}
    ]
    return np.sort(np.asarray(places, dtype=np.int64))


def evenly(count: int, limit: int) -> NDArray[np.int64]:
    """Up to `limit` of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, limit)).round().astype(np.int64))


def unit(largest: float, units: tuple[tuple[float, str], ...], smallest: str) -> tuple[float, str]:
    """Size and name of the unit in which `largest` is written."""
    return next(((size, name) for size, name in units if largest >= size), (1.0, smallest))
