"""Numbers by source and by teacher of runs with several teachers, as curves and a table. Read without trust."""

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megadistill.events import json_lines
from megadistill.redaction import printable
from megadistill.report.drawing import TEXT, Drawing, colour, draw, label, new_figure
from megadistill.report.run_record import Floats, RunRecord, number
from megadistill.report.smoothing import COUNTS, SMOOTHED_SHARE, evenly, smooth, unit
from megadistill.report.summary import LAST_STEPS
from megadistill.report.tables import Table, digits
from megadistill.units import short

KINDS = {"by_source": "source", "by_teacher": "teacher"}
"""Name of the groups in a line of metrics.jsonl -> what a group is."""
MAX_GROUPS = 32
"""Groups of a run and a kind that are read."""
MAX_ROWS = 200
POINTS = 200
"""Points of a line."""
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Line styles and markers of the groups of a figure, in turn."""


@dataclass(frozen=True)
class Group:
    """Tokens of a source, or of a teacher."""

    kind: str
    """A name of `KINDS`."""
    name: str
    tokens: Floats
    """Tokens of the run after each step in which the group has any."""
    curves: Mapping[str, Floats]
    """Values of `_CURVES` in these steps."""
    last: Mapping[str, float]
    """Means over the last of them of each number in the table; NaN where it has none."""


@dataclass(frozen=True)
class _Measure:
    name: str
    title: str


_CURVES = (
    _Measure("kl", "KL of the teacher against the student"),
    _Measure("targets_kl", "KL of the truncated targets against the student"),
    _Measure("student_ce", "Cross-entropy"),
)
_COLUMNS = {"student_ce": "CE", "teacher_ce": "teacher's CE", "kl": "KL", "targets_kl": "KL of targets"}
_IN_TABLE = ("labels", "agreement", *_COLUMNS)


class _Read:
    """The numbers of a group, as they are read."""

    def __init__(self) -> None:
        self.steps, self.tokens = array("d"), array("d")
        self.curves = {each.name: array("d") for each in _CURVES}
        self.last: deque[list[float]] = deque(maxlen=LAST_STEPS)

    def add(self, step: float, tokens: float, values: Mapping[str, object]) -> None:
        if self.steps and step <= self.steps[-1]:  # out of order or twice, which the page's notes say
            return
        self.steps.append(step)
        self.tokens.append(tokens)
        for name, column in self.curves.items():
            column.append(number(values.get(name)))
        self.last.append([number(values.get(name)) for name in _IN_TABLE])

    def group(self, kind: str, name: str) -> Group:
        curves = {key: np.frombuffer(column, dtype=np.float64) for key, column in self.curves.items()}
        last = {}
        for key, column in zip(_IN_TABLE, zip(*self.last, strict=True), strict=True):
            known = [value for value in column if np.isfinite(value)]
            last[key] = float(np.mean(known)) if known else np.nan
        return Group(kind, name, np.frombuffer(self.tokens, dtype=np.float64), curves, last)


def groups_of(run: RunRecord) -> list[Group]:
    """The groups in a run's metrics.jsonl, by kind and in the order of their first steps."""
    if not run.setting("teachers"):
        return []
    read: dict[str, dict[str, _Read]] = {kind: {} for kind in KINDS}
    for line in json_lines(run.folder / "metrics.jsonl"):
        step, tokens = (number(line.get(name)) for name in ("step", "tokens")) if line else (np.nan, np.nan)
        if line is None or not (step >= 1 and tokens >= 0):
            continue
        for kind, groups in read.items():
            values = line.get(kind)
            for name, each in islice(values.items(), MAX_GROUPS) if isinstance(values, dict) else ():
                if isinstance(each, dict) and (name in groups or len(groups) < MAX_GROUPS):
                    groups.setdefault(name, _Read()).add(step, tokens, each)
    return [each.group(kind, label(name)) for kind, groups in read.items() for name, each in groups.items()]


def group_curves(runs: Sequence[RunRecord], groups: Sequence[Sequence[Group]]) -> list[Drawing]:
    """A figure for each kind and measure: a line for each group of each run, in the run's colour."""
    drawings = []
    most = max((float(each.tokens[-1]) for of_run in groups for each in of_run), default=0.0)
    for kind, what in KINDS.items():
        for measure in _CURVES:
            of_runs = [[each for each in of_run if _knows(each, kind, measure.name)] for of_run in groups]
            if any(of_runs):
                figure_of = partial(_figure, name=measure.name, groups=of_runs, most=most)
                title = f"{measure.title}, by {what}"
                name = f"{kind}-{measure.name}".replace("_", "-")
                drawings.append(draw(figure_of, name, title, "", runs=[run.name for run in runs]))
    return drawings


def _knows(group: Group, kind: str, name: str) -> bool:
    return group.kind == kind and bool(np.isfinite(group.curves[name]).any())


def _figure(width: float, *, name: str, groups: Sequence[Sequence[Group]], most: float) -> Figure:
    figure, axes = new_figure(width)
    size, of_tokens = unit(most, COUNTS, "")
    names = list(dict.fromkeys(each.name for of_run in groups for each in of_run))
    looks: dict[str, dict[str, Any]] = {
        each: {"linestyle": STYLES[at % len(STYLES)], "marker": MARKERS[at % len(MARKERS)], "markersize": 3.5}
        for at, each in enumerate(names)
    }
    for run, of_run in enumerate(groups):
        for each in of_run:
            known = np.isfinite(each.curves[name])
            values = smooth(each.curves[name][known], max(1, int(known.sum()) // SMOOTHED_SHARE))
            at = evenly(len(values), POINTS)
            style: dict[str, Any] = {
                "color": colour(run),
                "gid": f"run-{run}",
                "linewidth": 1.2,
                "markevery": max(1, len(at) // 8),
            }
            axes.plot(each.tokens[known][at] / size, values[at], **style, **looks[each.name])
    handles = [Line2D([], [], color=TEXT, linewidth=1.2, **looks[each]) for each in names]
    axes.legend(handles, [label(each, limit=20) for each in names], fontsize=7)
    axes.set(xlabel=f"tokens ({of_tokens})" if of_tokens else "tokens", ylabel="nats a token")
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    return figure


def group_table(runs: Sequence[RunRecord], groups: Sequence[Sequence[Group]]) -> Table:
    """The last values of each group of each run."""
    rows, owners = [], []
    for index, (run, of_run) in enumerate(zip(runs, groups, strict=True)):
        for each in of_run:
            measured = [digits(each.last[key], ".4f") for key in _COLUMNS]
            labels, agreement = digits(each.last["labels"], ",.0f"), digits(each.last["agreement"], ".1%")
            rows.append([run.name, KINDS[each.kind], printable(each.name), labels, *measured, agreement])
            owners.append(index)
    headings = ["run", "by", "name", "tokens a step", *_COLUMNS.values(), "agreement"]
    return Table(headings, rows[:MAX_ROWS], owners[:MAX_ROWS])
