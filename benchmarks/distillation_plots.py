"""Figures of the distillation runs, from their results and metrics.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.distillation_page import FULL, LABELS, Key, Results, Row
from megadistill.types import DECILES

WINDOW = 64
"""Steps of a curve's moving average."""
CALIBRATION = (LABELS, FULL, "top-12-other", "top-12-renormalised", "reverse-kl", "top-1")
FEWEST = 100
"""Minimum tokens of a bin of the calibration diagram."""
# Okabe and Ito: distinct for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(results: Results, folders: Mapping[Key, Path], to: Path) -> None:
    """`distillation-ce.png`, `-curves.png`, `-deciles.png` and `-calibration.png` in the folder `to`."""
    matplotlib.use("Agg")
    _save(_by_row(results), to / "distillation-ce.png")
    _save(_curves(results, folders), to / "distillation-curves.png")
    _save(_by_decile(results), to / "distillation-deciles.png")
    _save(_calibration(results), to / "distillation-calibration.png")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, metadata={"Software": None})  # the same results give the same bytes


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _main(results: Results) -> dict[Row, str]:
    """The main rows, each with its colour in every figure."""
    return dict(zip([row for row in results.rows() if row.main], COLOURS, strict=False))


def _by_row(results: Results) -> Figure:
    """A dot a seed; what lies on the same side of `labels` is better or worse than no teacher."""
    figure, axes = _figure(8, 4.5)
    rows = results.rows()[::-1]
    for place, row in enumerate(rows):
        values = results.values(row, "cross_entropy")
        axes.scatter(values, [place] * len(values), s=28, color=COLOURS[0], alpha=0.8, zorder=3)
    for row in rows:
        if row.name == LABELS:
            axes.axvline(fmean(results.values(row, "cross_entropy")), color=COLOURS[1], lw=1, label="labels only, mean")
    axes.axvline(results.teacher["cross_entropy"], color="black", lw=1, ls="--", label="the teacher")
    axes.set_yticks(range(len(rows)), [row.signal for row in rows])
    axes.set_xlabel("held-out cross-entropy, nats a token (a dot a seed)")
    axes.legend(frameon=False)
    return figure


def _curves(results: Results, folders: Mapping[Key, Path]) -> Figure:
    figure, axes = _figure(8, 4.5)
    lowest = []
    for row, colour in _main(results).items():
        of_row = [_cross_entropies(folders[key]) for key in results.students if key[0] == row]
        tokens, values = of_row[0][0], np.mean([curve for _, curve in of_row], axis=0)
        axes.plot(tokens / 1e3, values, color=colour, label=row.signal)
        lowest.append(values.min())
    axes.set_ylim(min(lowest) - 0.05, min(lowest) + 1.6)
    axes.set_xlabel("thousand tokens")
    axes.set_ylabel("training cross-entropy, nats a token")
    axes.set_title(f"moving average of {WINDOW} steps, mean of the seeds", fontsize="medium", loc="left")
    axes.legend(frameon=False)
    return figure


def _cross_entropies(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the student's cross-entropy on what it reads."""
    steps = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        steps[step["step"]] = (step["tokens"], step["student_ce"])  # a later line of a step replaces an earlier one
    tokens, values = np.array([steps[number] for number in sorted(steps)]).T
    return tokens[WINDOW - 1 :], np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")


def _by_decile(results: Results) -> Figure:
    """Gain over labels by decile of the teacher's entropy."""
    figure, axes = _figure(8, 4)
    labels = {seed: _deciles(student) for (row, seed), student in results.students.items() if row.name == LABELS}
    for row, colour in _main(results).items():
        if row.name == LABELS:
            continue
        gains = [
            _deciles(student) - labels[seed] for (other, seed), student in results.students.items() if other == row
        ]
        axes.plot(range(1, DECILES + 1), np.mean(gains, axis=0), marker="o", ms=4, color=colour, label=row.signal)
    axes.axhline(0, color="black", lw=1)
    axes.set_xticks(range(1, DECILES + 1))
    axes.set_xlabel("tenth of the held-out tokens, by the teacher's entropy: 1 surest, 10 least sure")
    axes.set_ylabel("cross-entropy less that of labels, nats")
    axes.legend(frameon=False)
    return figure


def _deciles(evaluation: Mapping[str, object]) -> np.ndarray:
    by_decile = evaluation["by_decile"]
    assert isinstance(by_decile, list)
    return np.array([tenth["cross_entropy"] for tenth in by_decile])


def _calibration(results: Results) -> Figure:
    """Accuracy of the most likely token by its probability, for the first seed."""
    figure, axes = _figure(6, 5)
    axes.plot([0, 1], [0, 1], color="black", lw=1, ls="--", label="as sure as right")
    rows = [row for row in results.rows() if row.name in CALIBRATION]
    for colour, row in zip(COLOURS, rows, strict=False):
        student = next(student for (other, _), student in results.students.items() if other == row)
        bins = [one for one in student["calibration"] if one["count"] >= FEWEST]
        sure, right = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
        axes.plot(sure, right, marker="o", ms=3, color=colour, label=row.signal)
    axes.set_xlabel("probability of the most likely token")
    axes.set_ylabel("share of tokens where it is the next one")
    axes.legend(frameon=False)
    return figure
