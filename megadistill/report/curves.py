"""Curves of runs over tokens and over the wall clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megadistill.plan.units import count
from megadistill.report.drawing import Drawing, colour, dashes, draw, new_figure
from megadistill.report.event_plot import mark_trouble
from megadistill.report.run_record import Floats, RunRecord
from megadistill.report.smoothing import COUNTS, SMOOTHED_SHARE, TIMES, evenly, extremes, smooth, unit
from megadistill.report.wall_clock import Clock

RAW_POINTS, SMOOTHED_POINTS = 800, 300
"""Maximum points of a line; several runs share `POINTS`, so that a page of many long runs stays small."""
POINTS = 2400
FEW = 30
"""Maximum number of values that are drawn as points."""
OUTLIERS = 1.0
"""Percentage of the single values at either end that the frame may cut."""
STEEP_START = 1000
"""Minimum steps of a run whose first hundredth is ignored by the frame."""

TEACHERS = "Dashed: the teacher's."

Values: TypeAlias = Callable[[RunRecord], Floats]
Starts: TypeAlias = NDArray[np.int64]


def _of(name: str, *, scale: float = 1.0) -> Values:
    return lambda run: run.series[name] * scale


def _share(name: str) -> Values:
    """Percent of a step."""
    return lambda run: 100 * run.share(name)


@dataclass(frozen=True)
class Curve:
    """A figure with one line a run, and perhaps a dashed one beside it."""

    name: str
    title: str
    axis: str
    solid: Values
    dashed: Values | None = None
    caption: str = ""
    smoothed: bool = True
    from_zero: bool = False
    counts: bool = False
    """Counts of tokens, with an axis in thousands, millions, billions."""
    marks: bool = False


OVER_TOKENS = (
    Curve("loss", "Loss", "nats a token", _of("loss"), marks=True,
          caption="The minimised objective: comparable between runs of one objective only."),
    Curve("cross_entropy", "Cross-entropy", "nats a token", _of("student_ce"), _of("teacher_ce"), TEACHERS),
    Curve("kl", "KL of the teacher against the student", "nats a token", _of("kl"),
          caption="With sparse targets: over the stored ids."),
    Curve("agreement", "Agreement with the teacher", "% of tokens", _of("agreement", scale=100)),
    Curve("entropy", "Entropy", "nats a token", _of("student_entropy"), _of("teacher_entropy"), TEACHERS),
    Curve("grad_norm", "Gradient norm", "before clipping", _of("grad_norm")),
    Curve("learning_rate", "Learning rate", "", _of("learning_rate"), smoothed=False, from_zero=True),
    Curve("weights", "Weights of the loss", "", _of("kd_weight"), _of("ce_weight"),
          "Solid: the divergence. Dashed: the label's cross-entropy.", smoothed=False, from_zero=True),
    Curve("log_z", "log Z of the student", "", _of("log_z")),
    Curve("acceptance", "Acceptance", "% of tokens", _of("acceptance", scale=100),
          caption="Σ min(p, q): of speculative decoding with this student."),
    Curve("jsd", "Jensen-Shannon and reverse KL divergence", "nats a token", _of("jsd"), _of("reverse_kl"),
          "Dashed: reverse KL."),
)  # fmt: skip

OVER_TIME = (
    Curve("progress", "Progress", "tokens", _of("tokens"), smoothed=False, from_zero=True, counts=True,
          caption="Steps that count. Flat: startup, saving, or lost."),
    Curve("throughput", "Throughput", "tokens a second", _of("tokens_per_second"), from_zero=True, counts=True),
    Curve("mfu", "Model FLOPs utilisation", "% of peak", _of("mfu", scale=100), from_zero=True,
          caption="Student and teacher together; recomputation does not count."),
    Curve("waiting", "Waiting", "% of a step", _share("teacher_seconds"), _share("data_seconds"),
          "Solid: for the teacher. Dashed: for data. On rank 0.", from_zero=True),
    Curve("memory", "Memory", "GiB", _of("memory_bytes", scale=2**-30), smoothed=False, from_zero=True,
          caption="The peak so far on rank 0: of the device, or resident on a CPU."),
)  # fmt: skip


def curves_over_tokens(runs: Sequence[RunRecord]) -> list[Drawing]:
    """The figures for which any of the runs has values."""
    size, name = unit(max((run.series["tokens"].max() for run in runs if len(run)), default=0.0), COUNTS, "")
    places = [run.series["tokens"] / size for run in runs]
    axis = f"tokens ({name})" if name else "tokens"
    return _drawn(OVER_TOKENS, runs, places, [None] * len(runs), axis, reach=None)


def curves_over_time(runs: Sequence[RunRecord], clocks: Sequence[Clock]) -> list[Drawing]:
    """The figures for which any of the runs has values. A line is broken between two starts of its run."""
    size, name = unit(max(clock.wall for clock in clocks), TIMES, "seconds")
    places, starts = [clock.ends / size for clock in clocks], [clock.start for clock in clocks]
    reach = max(clock.wall for clock in clocks) / size
    return _drawn(OVER_TIME, runs, places, starts, f"{name} since the run began", reach=reach)


def _drawn(
    curves: Sequence[Curve],
    runs: Sequence[RunRecord],
    places: Sequence[Floats],
    starts: Sequence[Starts | None],
    axis: str,
    *,
    reach: float | None,
) -> list[Drawing]:
    """`reach`: end of the axes, so that they line up; None: the last value."""
    drawn = []
    for curve in curves:
        figure, axes = new_figure()
        seen: list[Floats] = []
        for index, run in enumerate(runs):
            line = partial(_plot, axes, index, places[index], starts=starts[index], among=len(runs))
            seen += line(curve.solid(run), smoothed=curve.smoothed)
            if curve.dashed is not None:
                seen += line(curve.dashed(run), smoothed=curve.smoothed, dashed=True)
            if curve.marks:
                mark_trouble(axes, index, run, places[index])
        if seen:
            _frame(axes, seen, from_zero=curve.from_zero)
            axes.set(xlabel=axis, ylabel=curve.axis)
            if reach:
                axes.set_xlim(-0.01 * reach, 1.02 * reach)
            if curve.counts:
                axes.yaxis.set_major_formatter(lambda value, _: count(value))
            drawn.append(draw(figure, curve.name, curve.title, curve.caption, runs=[run.name for run in runs]))
    return drawn


def _plot(
    axes: Axes,
    run: int,
    places: Floats,
    values: Floats,
    *,
    starts: Starts | None,
    among: int,
    smoothed: bool,
    dashed: bool = False,
) -> list[Floats]:
    """Draws values as a line, faint below a strong one of their mean. Returns the values that the frame must hold."""
    known = np.isfinite(values) & np.isfinite(places)
    places, values = places[known], values[known]
    starts = starts[known] if starts is not None else None
    if not len(values):
        return []
    width = max(1, len(values) // SMOOTHED_SHARE) if smoothed else 1
    raw = extremes(values, max(120, min(RAW_POINTS, POINTS // among)))
    strong: dict[str, Any] = {
        "color": colour(run),
        "linestyle": (0, (3, 2)) if dashed else dashes(run),
        "gid": f"run-{run}",
    }
    if width == 1:
        marker = "." if len(values) <= FEW else ""
        axes.plot(*_broken(places, values, raw, starts), linewidth=1.2, marker=marker, **strong)
        return [values]
    if not dashed:
        axes.plot(*_broken(places, values, raw, starts), linewidth=0.6, alpha=0.3, color=colour(run), gid=f"run-{run}")
    mean = smooth(values, width)
    chosen = evenly(len(mean), max(100, min(SMOOTHED_POINTS, POINTS // among)))
    axes.plot(*_broken(places, mean, chosen, starts), linewidth=1.4, **strong)
    after_start = len(values) // 100 if len(values) >= STEEP_START else 0
    return [mean[after_start:], np.percentile(values[after_start:], (OUTLIERS, 100 - OUTLIERS))]


def _broken(places: Floats, values: Floats, chosen: NDArray[np.int64], starts: Starts | None) -> tuple[Floats, Floats]:
    """The chosen points, with a gap between two starts of the run."""
    x, y = places[chosen], values[chosen]
    if starts is None:
        return x, y
    gaps = np.flatnonzero(np.diff(starts[chosen])) + 1
    return np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan)


def _frame(axes: Axes, seen: Sequence[Floats], *, from_zero: bool) -> None:
    low, high = min(float(each.min()) for each in seen), max(float(each.max()) for each in seen)
    low = min(low, 0.0) if from_zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low if from_zero and low == 0 else low - margin, high + margin)
