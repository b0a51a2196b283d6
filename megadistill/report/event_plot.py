"""Plots of the events of runs, and of the use of their wall time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megadistill.events import EVENTS, Goodput
from megadistill.report.drawing import TEXT, WIDE, Drawing, colour, draw, label, new_figure
from megadistill.report.run_record import Floats, RunRecord
from megadistill.report.smoothing import TIMES, evenly, unit
from megadistill.report.wall_clock import Clock

MARKS = {
    "attempt_started": ">",
    "resumed": "o",
    "branched": "1",
    "replicas_changed": "$r$",
    "recipe_changed": "p",
    "curriculum_entry": "$e$",
    "checkpoint_saved": "|",
    "checkpoint_failed": "v",
    "local_checkpoint_saved": "$l$",
    "local_checkpoint_failed": "$L$",
    "checkpoint_quarantined": "3",
    "step_skipped": "x",
    "loss_spike": "^",
    "student_diverged": "2",
    "experts_starved": "+",
    "rollback": "<",
    "teacher_drift": "*",
    "teacher_above_uniform": "4",
    "float8_teacher": "_",
    "samples_masked": ".",
    "validated": "$v$",
    "validation_plateau": "$=$",
    "held_out_masked": ",",
    "straggler": "d",
    "stop_requested": "P",
    "stopped": "s",
    "attempt_failed": "X",
    "completed": "D",
}
"""Marker of each of `EVENTS`; shapes differ, so that colours are not needed."""

assert MARKS.keys() == EVENTS.keys()

TROUBLE = ("step_skipped", "loss_spike", "student_diverged", "rollback", "teacher_drift", "attempt_failed")
"""Events that are marked under the loss."""

MAX_MARKS = 300
"""Maximum marks of a run and a kind; more would cover each other."""

PARTS = {
    "useful": "#2a7f78",
    "startup": "#8fc1bb",
    "validating": "#6b86b8",
    "saving": "#d9b44a",
    "repeated": "#c98a5a",
    "lost": "#b5473c",
}
"""Uses of the wall time, each with its colour."""

LANE = 0.46
"""Height of a run's name and bar, in inches."""
LEGEND_COLUMNS, NARROW_LEGEND_COLUMNS, NARROW_PARTS, LEGEND_LINE = 3, 2, 3, 0.2


def events_figure(runs: Sequence[RunRecord], clocks: Sequence[Clock]) -> Drawing:
    """A lane a run, with a bar for each attempt and its events."""
    caption = "A bar is an attempt, from its start to its last event or step."
    return draw(partial(_lanes, runs=runs, clocks=clocks), "events", "Events", caption)


def _lanes(width: float, *, runs: Sequence[RunRecord], clocks: Sequence[Clock]) -> Figure:
    longest = max(clock.wall for clock in clocks)
    size, name = unit(longest, TIMES, "seconds")
    kinds = [kind for kind in MARKS if any(event.kind == kind for run in runs for event in run.events)]
    columns = LEGEND_COLUMNS if width == WIDE else NARROW_LEGEND_COLUMNS
    height = 0.6 + LEGEND_LINE * -(-len(kinds) // columns) + LANE * len(runs)
    figure, axes = new_figure(width, height=height)
    for lane, (run, clock) in enumerate(zip(runs, clocks, strict=True)):
        bars = [(first / size, (last - first) / size) for first, last in _attempts(run, clock)]
        axes.broken_barh(bars, (lane - 0.15, 0.5), facecolor=colour(lane), alpha=0.35, gid=f"run-{lane}")
        for kind, marker in MARKS.items():
            times = np.array([event.time - clock.began for event in run.events if event.kind == kind]) / size
            times = times[evenly(len(times), MAX_MARKS)] if len(times) else times
            _mark(axes, lane, times, np.full(len(times), lane + 0.1), marker)
    _name_lanes(axes, runs)
    if longest > 0:
        axes.set_xlim(-0.01 * longest / size, 1.02 * longest / size)
    axes.set_xlabel(f"{name} since the run began")
    handles = [Line2D([], [], marker=MARKS[kind], color=TEXT, linestyle="", markersize=5) for kind in kinds]
    names = [kind.replace("_", " ") for kind in kinds]
    figure.legend(handles, names, loc="outside lower left", ncols=columns, handlelength=1.2, columnspacing=1.2)
    return figure


def _name_lanes(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """The name of each run above its bar, where a long one fits."""
    axes.set_yticks([])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    for lane, run in enumerate(runs):
        where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom", "gid": f"run-{lane}"}
        axes.text(0.005, lane - 0.18, label(run.name), **where)


def mark_trouble(axes: Axes, index: int, run: RunRecord, places: Floats) -> None:
    """Marks the faults of a run at the foot of its loss, which is drawn at `places`."""
    if not len(run):
        return
    for kind in TROUBLE:
        steps = np.array([event.step for event in run.events if event.kind == kind], dtype=np.float64)
        at = np.interp(steps[evenly(len(steps), MAX_MARKS)] if len(steps) else steps, run.series["step"], places)
        _mark(axes, index, at, np.full(len(at), 0.03), MARKS[kind], along=True)


def goodput_figure(runs: Sequence[RunRecord], goodputs: Sequence[Goodput]) -> Drawing:
    """A bar a run: its wall time by use."""
    caption = "Repeated: steps taken again. Lost: hangs, and from a fault to the next start."
    return draw(partial(_bars, runs=runs, goodputs=goodputs), "goodput", "Goodput", caption)


def _bars(width: float, *, runs: Sequence[RunRecord], goodputs: Sequence[Goodput]) -> Figure:
    columns = len(PARTS) if width == WIDE else NARROW_PARTS
    height = 0.7 + LEGEND_LINE * -(-len(PARTS) // columns) + LANE * len(runs)
    figure, axes = new_figure(width, height=height)
    left = np.zeros(len(runs))
    for part, shade in PARTS.items():
        shares = np.array([100 * getattr(each, part) / each.wall if each.wall > 0 else 0.0 for each in goodputs])
        places = np.arange(len(runs)) + 0.1
        bars = axes.barh(places, shares, left=left, height=0.5, color=shade, label=part)
        for index, bar in enumerate(bars):
            bar.set_gid(f"run-{index}")
        left += shares
    _name_lanes(axes, runs)
    axes.set(xlim=(0, 100), xlabel="% of the wall time")
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.2)
    return figure


def _attempts(run: RunRecord, clock: Clock) -> list[tuple[float, float]]:
    """First and last event or step of each attempt, in seconds since the run began."""
    spans: dict[int, tuple[float, float]] = {}
    resumes = [event for event in run.events if event.kind == "resumed"]
    signs = [(event.attempt, event.time - clock.began) for event in run.events]
    for index, resume in enumerate(resumes):
        own = clock.ends[clock.start == index]
        signs += [(resume.attempt, float(own[-1]))] if len(own) else []
    for attempt, time in signs:
        first, last = spans.get(attempt, (time, time))
        spans[attempt] = min(first, time), max(last, time)
    return list(spans.values())


def _mark(axes: Axes, run: int, x: Floats, y: Floats, marker: str, *, along: bool = False) -> None:
    """Marks at x; `along`: y is a share of the axes' height."""
    if len(x):
        transform = axes.get_xaxis_transform() if along else axes.transData
        fill = colour(run) if along else TEXT
        (marks,) = axes.plot(x, y, color=fill, marker=marker, markersize=5, linestyle="", transform=transform)
        marks.set(gid=f"run-{run}", clip_on=False)
