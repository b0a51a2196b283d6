"""Curves of runs over tokens and over the wall clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from megadistill.report.axis_limits import Limits, all_values, axis_limits
from megadistill.report.drawing import WIDE, Drawing, colour, dashes, draw, new_figure
from megadistill.report.event_plot import mark_trouble
from megadistill.report.run_record import Floats, RunRecord
from megadistill.report.smoothing import COUNTS, SMOOTHED_SHARE, TIMES, evenly, extremes, smooth, unit
from megadistill.report.wall_clock import Clock
from megadistill.units import count, short

RAW_POINTS, SMOOTHED_POINTS = 800, 300
"""Maximum points of a line; several runs share `POINTS`, so that a page of many long runs stays small."""
POINTS = 2400
FEW = 30
"""Maximum number of values that are drawn as points."""

TEACHERS = "Dashed: the teacher's."

Values: TypeAlias = Callable[[RunRecord], Floats]
Starts: TypeAlias = NDArray[np.int64]


def _of(name: str, *, scale: float = 1.0) -> Values:
    return lambda run: run.series[name] * scale


def _share(name: str) -> Values:
    """Percent of a step."""
    return lambda run: 100 * run.share(name)


def _teacher_wait(run: RunRecord) -> Floats:
    return 100 * run.share(run.teacher_wait)


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
    log: bool = False
    """May have a logarithmic axis."""


OVER_TOKENS = (
    Curve("loss", "Loss", "nats a token", _of("loss"), marks=True, log=True,
          caption="The minimised objective: comparable between runs of one objective only."),
    Curve("cross_entropy", "Cross-entropy", "nats a token", _of("student_ce"), _of("teacher_ce"), TEACHERS),
    Curve("kl", "KL of the teacher against the student", "nats a token", _of("kl"),
          caption="Of the complete distributions, at temperature 1.", log=True),
    Curve("targets_kl", "KL of the truncated targets against the student", "nats a token", _of("targets_kl"),
          log=True, caption="The loss with loss.targets: over a part of the ids, and no measure of the student."),
    Curve("agreement", "Agreement with the teacher", "% of tokens", _of("agreement", scale=100)),
    Curve("entropy", "Entropy", "nats a token", _of("student_entropy"), _of("teacher_entropy"), TEACHERS),
    Curve("grad_norm", "Gradient norm", "before clipping", _of("grad_norm"), log=True),
    Curve("learning_rate", "Learning rate", "", _of("learning_rate"), smoothed=False, from_zero=True),
    Curve("weights", "Weights of the loss", "", _of("kd_weight"), _of("ce_weight"),
          "Solid: the divergence. Dashed: the label's cross-entropy.", smoothed=False, from_zero=True),
    Curve("log_z", "log Z of the student", "", _of("log_z")),
    Curve("experts", "Load of the experts", "of an even share", _of("max_load"), _of("min_load"), log=True,
          caption="Solid: of the expert with most tokens in a step, over all layers. Dashed: with fewest. 1 is even."),
    Curve("acceptance", "Acceptance", "% of tokens", _of("acceptance", scale=100),
          caption="Σ min(p, q): of speculative decoding with this student."),
    Curve("jsd", "Jensen-Shannon and reverse KL divergence", "nats a token", _of("jsd"), _of("reverse_kl"),
          "Dashed: reverse KL.", log=True),
)  # fmt: skip

OVER_TIME = (
    Curve("progress", "Progress", "tokens", _of("tokens"), smoothed=False, from_zero=True, counts=True,
          caption="Steps that count. Flat: startup, saving, or lost."),
    Curve("throughput", "Throughput", "tokens a second", _of("tokens_per_second"), from_zero=True, counts=True),
    Curve("mfu", "Model FLOPs utilisation", "% of peak", _of("mfu", scale=100), from_zero=True,
          caption="Student and teacher together; recomputation does not count."),
    Curve("waiting", "Waiting", "% of a step", _teacher_wait, _share("data_seconds"),
          "Solid: for the teacher. Dashed: for data. On rank 0.", from_zero=True),
    Curve("memory", "Memory", "GB", _of("memory_bytes", scale=1e-9), smoothed=False, from_zero=True,
          caption="The peak so far on rank 0: of the device, or resident on a CPU."),
)  # fmt: skip


def curves_over_tokens(runs: Sequence[RunRecord]) -> list[Drawing]:
    """The figures for which any of the runs has values."""
    size, name = unit(max((run.series["tokens"].max() for run in runs if len(run)), default=0.0), COUNTS, "")
    places = [run.series["tokens"] / size for run in runs]
    axis = f"tokens ({name})" if name else "tokens"
    return _drawn(OVER_TOKENS, runs, Frame(places, [None] * len(runs), axis))


def curves_over_time(runs: Sequence[RunRecord], clocks: Sequence[Clock]) -> list[Drawing]:
    """The figures for which any of the runs has values. A line is broken between two starts of its run."""
    size, name = unit(max(clock.wall for clock in clocks), TIMES, "seconds")
    places, starts = [clock.ends / size for clock in clocks], [clock.start for clock in clocks]
    reach = max(clock.wall for clock in clocks) / size
    return _drawn(OVER_TIME, runs, Frame(places, starts, f"{name} since the run began", reach))


@dataclass(frozen=True)
class Points:
    """Values of a run at some of its steps."""

    run: int
    steps: Floats
    tokens: Floats
    values: Floats


def points_over_tokens(
    curve: Curve, points: Sequence[Points], runs: Sequence[RunRecord], *, most_tokens: float
) -> Drawing:
    """A figure of values that are measured now and then. Its axis goes to `most_tokens`, as those of other figures."""
    size, name = unit(most_tokens, COUNTS, "")
    lines = [Line(each.run, each.steps, each.tokens / size, each.values, None, dashed=False) for each in points]
    frame = Frame([], [None] * len(runs), f"tokens ({name})" if name else "tokens", most_tokens / size)
    limits = all_values([line.values for line in lines], from_zero=curve.from_zero)
    figure_of = partial(_figure, curve=curve, lines=lines, limits=limits, runs=runs, frame=frame)
    return draw(figure_of, curve.name, curve.title, curve.caption, runs=[run.name for run in runs])


@dataclass(frozen=True)
class Line:
    """The finite values of a run in a figure."""

    run: int
    steps: Floats
    places: Floats
    """Places on the horizontal axis."""
    values: Floats
    starts: Starts | None
    """Number of the start in which each step was taken, between which the line is broken."""
    dashed: bool


@dataclass(frozen=True)
class Frame:
    """The horizontal axis that figures share."""

    places: Sequence[Floats]
    """[runs][steps] place of each step."""
    starts: Sequence[Starts | None]
    label: str
    reach: float | None = None
    """End of the axis, so that figures line up; None: the last value."""


def _drawn(curves: Sequence[Curve], runs: Sequence[RunRecord], frame: Frame) -> list[Drawing]:
    drawn = []
    for curve in curves:
        lines = _lines(curve, runs, frame)
        if not lines:
            continue
        values = [line.values for line in lines]
        if curve.smoothed:
            limits = axis_limits(values, from_zero=curve.from_zero, may_be_log=curve.log)
        else:
            limits = all_values(values, from_zero=curve.from_zero)
        caption = " ".join(filter(None, (curve.caption, _outliers(lines, limits, runs, counts=curve.counts))))
        figure_of = partial(_figure, curve=curve, lines=lines, limits=limits, runs=runs, frame=frame)
        drawn.append(draw(figure_of, curve.name, curve.title, caption, runs=[run.name for run in runs]))
    return drawn


def _lines(curve: Curve, runs: Sequence[RunRecord], frame: Frame) -> list[Line]:
    lines = []
    for index, (run, places, starts) in enumerate(zip(runs, frame.places, frame.starts, strict=True)):
        for values_of, dashed in ((curve.solid, False), (curve.dashed, True)):
            if values_of is None:
                continue
            values = values_of(run)
            known = np.isfinite(values) & np.isfinite(places)
            if known.any():
                parts = (run.series["step"][known], places[known], values[known])
                lines.append(Line(index, *parts, starts[known] if starts is not None else None, dashed))
    return lines


def _outliers(lines: Sequence[Line], limits: Limits, runs: Sequence[RunRecord], *, counts: bool) -> str:
    """The farthest values above and below the axis, in words."""
    parts = []
    for sign, mark, word in ((1, "▲", "above"), (-1, "▼", "below")):
        line = max(lines, key=lambda line: float((sign * line.values).max()))
        at = int((sign * line.values).argmax())
        value = float(line.values[at])
        if value > limits.high if sign > 0 else value < limits.low:
            whose = f"{runs[line.run].name}, " if len(runs) > 1 else ""
            amount = count(value) if counts else short(value)
            parts.append(f"{mark} {word} the axis: as far as {amount} ({whose}step {int(line.steps[at]):,}).")
    return " ".join(parts)


def _figure(
    width: float, *, curve: Curve, lines: Sequence[Line], limits: Limits, runs: Sequence[RunRecord], frame: Frame
) -> Figure:
    figure, axes = new_figure(width)
    for line in lines:
        _plot(axes, line, points=int(POINTS * width / WIDE) // len(runs), smoothed=curve.smoothed)
        _mark_outside(axes, line, limits)
    if curve.marks:
        for index, run in enumerate(runs):
            mark_trouble(axes, index, run, frame.places[index])
    axes.set(xlabel=frame.label, ylabel=", ".join(filter(None, (curve.axis, "log scale" if limits.log else ""))))
    if limits.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(limits.low, limits.high)
    if frame.reach:
        axes.set_xlim(-0.01 * frame.reach, 1.02 * frame.reach)
    axes.yaxis.set_major_formatter(lambda value, _: count(value) if curve.counts else short(value))
    return figure


def _plot(axes: Axes, line: Line, *, points: int, smoothed: bool) -> None:
    """Draws values as a line, faint below a strong one of their mean."""
    places, values, starts = line.places, line.values, line.starts
    width = max(1, len(values) // SMOOTHED_SHARE) if smoothed else 1
    raw = extremes(values, max(120, min(RAW_POINTS, points)))
    strong: dict[str, Any] = {
        "color": colour(line.run),
        "linestyle": (0, (3, 2)) if line.dashed else dashes(line.run),
        "gid": f"run-{line.run}",
    }
    if width == 1:
        marker = "." if len(values) <= FEW else ""
        axes.plot(*_broken(places, values, raw, starts), linewidth=1.2, marker=marker, **strong)
        return
    if not line.dashed:
        faint: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.3, "color": colour(line.run), "gid": f"run-{line.run}"}
        axes.plot(*_broken(places, values, raw, starts), **faint)
    mean = smooth(values, width)
    chosen = evenly(len(mean), max(100, min(SMOOTHED_POINTS, points)))
    axes.plot(*_broken(places, mean, chosen, starts), linewidth=1.4, **strong)


def _mark_outside(axes: Axes, line: Line, limits: Limits) -> None:
    """Marks at the edges where values are outside."""
    for at, height, marker in zip(limits.outside(line.values), (0.985, 0.015), "^v", strict=True):
        if len(at):
            where = np.full(len(at), height)
            style: dict[str, Any] = {"color": colour(line.run), "markersize": 4, "gid": f"run-{line.run}"}
            axes.plot(line.places[at], where, marker, transform=axes.get_xaxis_transform(), **style)


def _broken(places: Floats, values: Floats, chosen: NDArray[np.int64], starts: Starts | None) -> tuple[Floats, Floats]:
    """The chosen points, with a gap between two starts of the run."""
    x, y = places[chosen], values[chosen]
    if starts is None:
        return x, y
    gaps = np.flatnonzero(np.diff(starts[chosen])) + 1
    return np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan)
