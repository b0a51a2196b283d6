"""Evaluations as tables and figures, of a page or in files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megadistill.evaluate.evaluation import Evaluation, measure_rows
from megadistill.heldout.measures import Measures
from megadistill.io import atomic_write
from megadistill.report.drawing import WIDE, Drawing, colour, dashes, draw, label, style
from megadistill.report.tables import NOTHING, Table, text

DPI = 160
PANEL, PANEL_HEIGHT = 1.72, 2.8
"""Minimum width and height of a reliability diagram, in inches."""
PANEL_LABEL = 20
"""Maximum length of the model's name above one."""
DECILES_HEIGHT = 2.3


@dataclass(frozen=True)
class Results:
    """One file of evaluations."""

    name: str
    models: Sequence[Evaluation]

    def table(self) -> Table:
        """A row a model."""
        return _table("model", [(each.model, each) for each in self.models])

    def by_source(self) -> Table | None:
        """A row a model and source; None where there is one source alone."""
        parts = [(f"{each.model}: {part.source}", part) for each in self.models for part in each.by_source]
        return _table("model: source", parts) if len(parts) > len(self.models) else None

    def figures(self, prefix: str) -> list[Drawing]:
        """Calibration, and where there was a teacher the results by decile of its entropy."""
        caption = "Confidence: the probability of the most likely token. Accuracy: how often it was the label."
        drawn = [draw(partial(calibration_figure, self.models), f"{prefix}-calibration", "Calibration", caption)]
        if self.models[0].by_decile is not None:
            title, caption = "By decile of the teacher's entropy", "1: the tenth of lowest entropy."
            drawn.append(draw(partial(deciles_figure, self.models), f"{prefix}-deciles", title, caption))
        return drawn


def _table(heading: str, results: Sequence[tuple[str, Measures]]) -> Table:
    named = [(text(name), result) for name, result in results]
    head, *rows = measure_rows(heading, named, missing=NOTHING)
    return Table(head, rows)


def write_plots(results: Sequence[Evaluation], folder: Path) -> list[Path]:
    """Writes `calibration.png`, and `deciles.png` where there is a teacher; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        figures = {"calibration.png": calibration_figure(results)}
        title = "Calibration: how often the most likely token is the right one"
        figures["calibration.png"].suptitle(title, x=0.01, ha="left", fontsize=9.5)
        if results[0].by_decile is not None:
            figures["deciles.png"] = deciles_figure(results)
        for name, figure in figures.items():
            with atomic_write(folder / name) as file:
                figure.savefig(file, format="png", dpi=DPI, facecolor="white")
    return [folder / name for name in figures]


def calibration_figure(results: Sequence[Evaluation], width: float = WIDE) -> Figure:
    """A reliability diagram a model (Guo et al., 2017, arXiv:1706.04599, figure 1), over the counts of its bins."""
    columns = min(int(width / PANEL), len(results))
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(width, PANEL_HEIGHT * lines + 0.3))
    grid = figure.subplots(2 * lines, columns, sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1] * lines)
    most = max(one.count for result in results for one in result.calibration) / min(r.tokens for r in results)
    for place, result in enumerate(results):
        above, below = (grid[2 * (place // columns) + half, place % columns] for half in (0, 1))
        _panels(above, below, result, colour(place), most)
        if place % columns == 0:
            above.set_ylabel("accuracy")
            below.set_ylabel("% of tokens")
        below.set_xlabel("confidence")
        below.tick_params(labelbottom=True)  # the lowest row may not reach this column
    for rest in range(len(results), lines * columns):
        for half in (0, 1):
            grid[2 * (rest // columns) + half, rest % columns].set_axis_off()
    return figure


def _panels(above: Axes, below: Axes, result: Evaluation, shade: str, most: float) -> None:
    """Accuracies of a model's bins above, and their shares of the tokens below."""
    bins, width = result.calibration, 1 / len(result.calibration)
    middles = (np.arange(len(bins)) + 0.5) * width
    filled = [number for number, one in enumerate(bins) if one.count]
    accuracies = [bins[number].accuracy or 0.0 for number in filled]
    above.bar(middles[filled], accuracies, width=0.9 * width, color=shade, alpha=0.35, label="accuracy of the bin")
    above.plot([0, 1], [0, 1], color="#8a8a90", linewidth=0.8)
    # Where in its bin the mean lies: the distance to the diagonal is what the error adds up.
    above.plot([bins[number].confidence or 0.0 for number in filled], accuracies, "o", color=shade, markersize=3)
    above.set(xlim=(0, 1), ylim=(0, 1))
    above.set_title(f"{label(result.model, limit=PANEL_LABEL)}\nerror {result.calibration_error:.2%}", fontsize=8.5)
    below.bar(middles, [100 * one.count / result.tokens for one in bins], width=0.9 * width, color=shade)
    below.set_ylim(0, 105 * most)


def deciles_figure(results: Sequence[Evaluation], width: float = WIDE) -> Figure:
    """Cross-entropy of all models and KL of the students, by tenth of the tokens."""
    students = results[1:]
    panels = [("cross-entropy, nats a token", "cross_entropy", results)]
    if students:
        panels.append(("KL from the teacher, nats a token", "kl", students))
    figure = Figure(figsize=(width, DECILES_HEIGHT * len(panels)))
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (title, name, among) in zip(grid, panels, strict=True):
        for result in among:
            place = results.index(result)
            values = np.array([getattr(one, name) for one in result.by_decile or ()], dtype=np.float64)  # None: NaN
            tenths = range(1, len(values) + 1)
            axes.plot(tenths, values, marker="o", markersize=3, color=colour(place), linestyle=dashes(place))
        axes.set_xticks(range(1, len(results[0].by_decile or ()) + 1))
        axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left")
    grid[-1].set_xlabel("tenth of the tokens, by the teacher's entropy")
    names = [label(result.model) for result in results]
    figure.legend(grid[0].get_lines(), names, loc="outside lower left", ncols=2 if width == WIDE else 1)
    return figure
