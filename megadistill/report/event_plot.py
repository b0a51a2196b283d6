"""Plots of the events of runs, and of the use of their wall time."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megadistill.events import EVENTS, Goodput
from megadistill.report.drawing import TEXT, Drawing, colour, draw, label, new_figure
from megadistill.report.run_record import Floats, RunRecord
from megadistill.report.smoothing import TIMES, evenly, unit
from megadistill.report.wall_clock import Clock

MARKS = {
    "attempt_started": ">",
    "resumed": "o",
    "checkpoint_saved": "|",
    "checkpoint_failed": "v",
    "checkpoint_quarantined": "s",
    "step_skipped": "x",
    "loss_spike": "^",
    "rollback": "<",
    "teacher_drift": "*",
    "samples_masked": ".",
    "straggler": "d",
    "stop_requested": "P",
    "stopped": "H",
    "attempt_failed": "X",
    "completed": "D",
}
"""Marker of each of `EVENTS`; shapes differ, so that colours are not needed."""

assert MARKS.keys() == EVENTS.keys()

TROUBLE = ("step_skipped", "loss_spike", "rollback", "teacher_drift", "attempt_failed")
"""Events that are marked under the loss."""

MAX_MARKS = 300
"""Maximum marks of a run and a kind; more would cover each other."""

PARTS = {"useful": "#2a7f78", "startup": "#8fc1bb", "saving": "#d9b44a", "lost": "#b5473c"}
"""Uses of the wall time, each with its colour."""


def events_figure(runs: Sequence[RunRecord], clocks: Sequence[Clock]) -> Drawing:
    """A lane a run, with a bar for each attempt and its events."""
    longest = max(clock.wall for clock in clocks)
    size, name = unit(longest, TIMES, "seconds")
    figure, axes = new_figure(height=1.2 + 0.4 * len(runs))
    for lane, (run, clock) in enumerate(zip(runs, clocks, strict=True)):
        bars = [(first / size, (last - first) / size) for first, last in _attempts(run, clock)]
        axes.broken_barh(bars, (lane - 0.3, 0.6), facecolor=colour(lane), alpha=0.35, gid=f"run-{lane}")
        for kind, marker in MARKS.items():
            times = np.array([event.time - clock.began for event in run.events if event.kind == kind]) / size
            times = times[evenly(len(times), MAX_MARKS)] if len(times) else times
            _mark(axes, lane, times, np.full(len(times), lane), marker)
    axes.set_yticks(range(len(runs)), [label(run.name) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    if longest > 0:
        axes.set_xlim(-0.01 * longest / size, 1.02 * longest / size)
    axes.set_xlabel(f"{name} since the run began")
    _legend(axes, [kind for kind in MARKS if any(event.kind == kind for run in runs for event in run.events)])
    return draw(figure, "events", "Events", "A bar is an attempt, from its start to its last event or step.")


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
    figure, axes = new_figure(height=1.2 + 0.35 * len(runs))
    left = np.zeros(len(runs))
    for part, shade in PARTS.items():
        shares = np.array([100 * getattr(each, part) / each.wall if each.wall > 0 else 0.0 for each in goodputs])
        bars = axes.barh(range(len(runs)), shares, left=left, height=0.6, color=shade, label=part)
        for index, bar in enumerate(bars):
            bar.set_gid(f"run-{index}")
        left += shares
    axes.set_yticks(range(len(runs)), [label(run.name) for run in runs])
    axes.set(ylim=(len(runs) - 0.5, -0.5), xlim=(0, 100), xlabel="% of the wall time")
    axes.figure.legend(loc="outside upper center", ncols=len(PARTS))
    return draw(figure, "goodput", "Goodput", "Lost: steps that were taken again, hangs, the time between attempts.")


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
        axes.plot(x, y, marker, color=fill, markersize=5, transform=transform, gid=f"run-{run}", clip_on=False)


def _legend(axes: Axes, kinds: Sequence[str]) -> None:
    handles = [Line2D([], [], marker=MARKS[kind], color=TEXT, linestyle="", markersize=5) for kind in kinds]
    axes.figure.legend(handles, [kind.replace("_", " ") for kind in kinds], loc="outside lower center", ncols=6)
