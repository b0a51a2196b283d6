"""The validations of runs, as curves and a table of a page. Read without trust, as `run_record` reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megadistill.errors import UserError
from megadistill.events import ALL, read_validations
from megadistill.redaction import printable
from megadistill.report.drawing import TEXT, Drawing, colour, dashes, draw, label, new_figure
from megadistill.report.run_record import LARGEST, RunRecord, number
from megadistill.report.smoothing import COUNTS, unit
from megadistill.report.tables import Table, digits
from megadistill.units import short

MAX_VALIDATIONS = 100_000
"""Lines of a file that are read."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Markers of the first splits of a figure; the table has more."""
MAX_ROWS = 100


@dataclass(frozen=True)
class Validated:
    """A validation of a run."""

    step: int
    tokens: float
    splits: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class _Measure:
    name: str
    title: str
    axis: str
    form: str
    """Format of the table."""
    scale: float = 1.0
    caption: str = ""


MEASURES = (
    _Measure("cross_entropy", "Held-out cross-entropy", "nats a token", ".4f",
             caption="Dotted: the teacher's, over all splits."),
    _Measure("kl", "Held-out KL of the teacher against the student", "nats a token", ".4f"),
    _Measure("agreement", "Held-out agreement with the teacher", "% of tokens", ".1%", 100.0),
    _Measure("acceptance", "Held-out acceptance", "% of tokens", ".1%", 100.0, "Σ min(p, q)."),
    _Measure("calibration_error", "Held-out calibration error", "%", ".2%", 100.0, "Of the top-1 probability."),
)  # fmt: skip


def validations_of(run: RunRecord, notes: list[str]) -> list[Validated]:
    """The validations in a run's folder, by their steps; of a step that has two, the later."""
    try:
        lines = {int(line["step"]): _bounded(line) for line in islice(read_validations(run.folder), MAX_VALIDATIONS)}
    except UserError as error:
        notes.append(printable(str(error)))
        return []
    return [lines[step] for step in sorted(lines)]


def _bounded(line: Mapping[str, Any]) -> Validated:
    splits = {
        printable(name): {key: value for key, value in each.items() if abs(number(value)) <= LARGEST}
        for name, each in line["splits"].items()
    }
    return Validated(line["step"], float(line["tokens"]), splits)


def validation_curves(runs: Sequence[RunRecord], validations: Sequence[Sequence[Validated]]) -> list[Drawing]:
    """A figure for each measure: a line for each run over all splits, and a faint one with markers for each split."""
    most = max((each.tokens for of_run in validations for each in of_run), default=0.0)
    drawings = []
    for measure in MEASURES:
        measured = (split for of_run in validations for each in of_run for split in each.splits.values())
        if any(measure.name in split for split in measured):  # all splits together lack what one of them lacks
            figure_of = partial(_figure, measure=measure, validations=validations, most=most)
            name = f"validation-{measure.name.replace('_', '-')}"
            drawings.append(draw(figure_of, name, measure.title, measure.caption, runs=[run.name for run in runs]))
    return drawings


def _figure(width: float, *, measure: _Measure, validations: Sequence[Sequence[Validated]], most: float) -> Figure:
    figure, axes = new_figure(width)
    size, name = unit(most, COUNTS, "")
    splits = _splits(validations)
    for run, of_run in enumerate(validations):
        own: dict[str, Any] = {"color": colour(run), "gid": f"run-{run}"}

        def plot(split: str, key: str, of_run: Sequence[Validated] = of_run, **style: Any) -> None:
            points = [(each.tokens / size, each.splits.get(split, {}).get(key)) for each in of_run]
            known = np.array([(x, measure.scale * y) for x, y in points if y is not None], dtype=np.float64)
            if len(known):
                axes.plot(known[:, 0], known[:, 1], **style)

        plot(ALL, measure.name, linewidth=1.6, linestyle=dashes(run), marker="." if len(of_run) < 30 else "", **own)
        for split, marker in zip(splits, MARKERS, strict=False) if len(splits) > 1 else ():
            plot(split, measure.name, linewidth=0.7, alpha=0.6, marker=marker, markersize=3.5, **own)
        if measure.name == "cross_entropy":
            plot(ALL, "teacher_cross_entropy", linewidth=1.2, linestyle=":", **own)
    if len(splits) > 1:
        pairs = list(zip(splits, MARKERS, strict=False))
        handles = [Line2D([], [], color=TEXT, linewidth=1.6)]
        handles += [Line2D([], [], color=TEXT, linewidth=0.7, marker=marker, markersize=3.5) for _, marker in pairs]
        axes.legend(handles, ["all splits", *(label(split, limit=20) for split, _ in pairs)], fontsize=7)
    axes.set(xlabel=f"tokens ({name})" if name else "tokens", ylabel=measure.axis)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    return figure


def _splits(validations: Sequence[Sequence[Validated]]) -> list[str]:
    """Names of the splits of all runs, in the order of their first validations."""
    return list(dict.fromkeys(name for of_run in validations for each in of_run for name in each.splits if name != ALL))


def validation_table(runs: Sequence[RunRecord], validations: Sequence[Sequence[Validated]]) -> Table:
    """The last validation of each run, a row for each split; and the step with the lowest cross-entropy."""
    rows, owners = [], []
    for index, (run, of_run) in enumerate(zip(runs, validations, strict=True)):
        for split, values in of_run[-1].splits.items() if of_run else ():
            known = [(each.splits[split]["cross_entropy"], each.step) for each in of_run if _knows(each, split)]
            best = f"{min(known)[0]:.4f} at step {min(known)[1]:,}" if known else "–"
            measured = [digits(values.get(each.name, np.nan), each.form) for each in MEASURES]
            teacher = digits(values.get("teacher_cross_entropy", np.nan), ".4f")
            tokens = digits(values.get("tokens", np.nan), ",.0f")
            step = f"{of_run[-1].step:,}"
            rows.append([run.name, step, split, tokens, measured[0], best, teacher, *measured[1:]])
            owners.append(index)
    headings = ["run", "step", "split", "tokens", "CE", "lowest CE", "teacher's CE", "KL", "agreement", "acceptance"]
    return Table([*headings, "calibration error"], rows[:MAX_ROWS], owners[:MAX_ROWS])


def _knows(validated: Validated, split: str) -> bool:
    return "cross_entropy" in validated.splits.get(split, {})
