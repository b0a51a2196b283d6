"""Measurements of a run's checkpoints by a follower, as curves and tables of a page."""

import re
from collections.abc import Sequence

import numpy as np

from megadistill.evaluate.checkpoint_scores import CheckpointScores, newest_scores
from megadistill.report.curves import Curve, Points, points_over_tokens
from megadistill.report.drawing import Drawing
from megadistill.report.run_record import RunRecord
from megadistill.report.tables import NOTHING, Table, text

MAX_CURVES = 24
MAX_COLUMNS = 12
MAX_ROWS = 100
"""Checkpoints of a run in the table, the newest ones."""

Followed = Sequence[Sequence[CheckpointScores]]
"""Rows of each run."""


def score_curves(runs: Sequence[RunRecord], followed: Followed) -> list[Drawing]:
    """A figure for each metric of a task, the first `MAX_CURVES` of them, with a line a run."""
    scores = [newest_scores(rows) for rows in followed]
    names = list(dict.fromkeys(name for each in scores for name in each))[:MAX_CURVES]
    logged = [float(run.series["tokens"].max()) for run in runs if len(run)]
    most = max([*logged, *(float(row.tokens) for rows in followed for row in rows), 1.0])
    drawings = []
    for number, name in enumerate(names, 1):
        points = []
        for index, each in enumerate(scores):
            if name in each:
                steps, values = zip(*sorted(each[name].items()), strict=True)
                tokens_values = np.array(values, dtype=np.float64)
                points.append(Points(index, np.array(steps, float), tokens_values[:, 0], tokens_values[:, 1]))
        task, metric = map(text, name)
        slug = re.sub(r"[^a-z0-9]+", "-", task.lower())[:40]
        curve = Curve(f"score-{number}-{slug}", task, metric, lambda run: run.series["tokens"])
        drawings.append(points_over_tokens(curve, points, runs, most_tokens=most))
    return drawings


def checkpoint_scores(runs: Sequence[RunRecord], followed: Followed) -> Table:
    """A row for each checkpoint that was measured on tasks, with the first `MAX_COLUMNS` metrics."""
    scores = [newest_scores(rows) for rows in followed]
    names = list(dict.fromkeys(name for each in scores for name in each))[:MAX_COLUMNS]
    rows, owners = [], []
    for index, (run, each) in enumerate(zip(runs, scores, strict=True)):
        tokens = {step: count for values in each.values() for step, (count, _) in values.items()}
        for step in sorted(tokens)[-MAX_ROWS:]:
            cells = [each.get(name, {}).get(step) for name in names]
            rows.append([run.name, f"{step:,}", f"{tokens[step]:,}", *map(_cell, cells)])
            owners.append(index)
    return Table(["run", "step", "tokens", *(f"{text(task)}: {text(metric)}" for task, metric in names)], rows, owners)


def _cell(value: tuple[int, float] | None) -> str:
    return NOTHING if value is None else f"{value[1]:.4f}"


def checkpoint_samples(runs: Sequence[RunRecord], followed: Followed) -> Table:
    """The continuations of each prompt by the newest checkpoint that was sampled."""
    rows, owners = [], []
    for index, (run, each) in enumerate(zip(runs, followed, strict=True)):
        sampled = max((row for row in each if row.samples), key=lambda row: (row.step, row.time), default=None)
        for sample in sampled.samples if sampled is not None else ():
            end = " (end of the document)" if sample.ended else ""
            rows.append([run.name, f"{sampled.step:,}", text(sample.prompt), text(sample.text) + end])  # type: ignore[union-attr]
            owners.append(index)
    return Table(["run", "step", "prompt", "continuation"], rows, owners)
