"""The results of the distillation runs as a table, a CSV file and a page.

The gap is what the teacher's whole distribution gains over labels, of the same seed: CE of `labels` less CE of
`full-kl`. A row's share of it is 0 where it does as `labels` does and 100 where it does as `full-kl`.
"""

import csv
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.markdown import put
from benchmarks.report import ROOT, cpu
from megadistill.errors import UserError
from megadistill.export.markdown import table

PAGE = ROOT / "docs/results/distillation.md"
CSV = ROOT / "benchmarks/results/distillation.csv"
LABELS, FULL = "labels", "full-kl"
SEQUENCE = 128
"""Tokens."""
MEASURES = (
    *("parameters", "tokens", "cross_entropy", "bits_per_byte", "kl", "jsd"),
    *("acceptance", "calibration_error", "agreement"),
)
HEADING = ("training signal", "held-out CE", "share of the gap", "KL", "acceptance", "calibration error %", "agreement")


@dataclass(frozen=True)
class Row:
    """A kind of training target."""

    name: str
    """Name of the recipe."""
    signal: str
    """Name in the table."""
    main: bool = False
    """Whether it is trained with every seed; the others are trained with the first alone."""


Key = tuple[Row, int]
"""A row and a seed."""


@dataclass(frozen=True)
class Results:
    """Evaluations of all students and of the teacher."""

    students: Mapping[Key, Mapping[str, Any]]
    teacher: Mapping[str, Any]

    def rows(self) -> list[Row]:
        """The best first, by their share of the gap: a row of one seed is compared with the others' same seed."""
        return sorted(dict.fromkeys(row for row, _ in self.students), key=self._place)

    def _place(self, row: Row) -> tuple[bool, float]:
        shares = self.shares(row)
        return (False, -fmean(shares)) if shares else (True, fmean(self.values(row, "cross_entropy")))

    def values(self, row: Row, measure: str) -> list[float]:
        """One value a seed."""
        return [float(student[measure]) for (other, _), student in self.students.items() if other == row]

    def shares(self, row: Row) -> list[float]:
        """Percent of the gap of the same seed, for each seed that has `labels` and `full-kl`."""
        by_name = {(r.name, seed): float(student["cross_entropy"]) for (r, seed), student in self.students.items()}
        shares = []
        for seed in (seed for other, seed in self.students if other == row):
            zero, hundred = by_name.get((LABELS, seed)), by_name.get((FULL, seed))
            if zero is not None and hundred is not None:
                shares.append(100 * (zero - by_name[row.name, seed]) / (zero - hundred))
        return shares


def read_results(evaluations: Mapping[Key, Path]) -> Results:
    """The results in files of `megadistill evaluate`, of the teacher and then the student.

    Raises:
        UserError: there is none, or one lacks a measure.
    """
    if not evaluations:
        raise UserError("no run has an evaluation yet: look at the logs")
    students = {}
    for key, path in evaluations.items():
        teacher, student = json.loads(path.read_text(encoding="utf-8"))
        lacking = [measure for measure in MEASURES if student.get(measure) is None]
        if lacking:
            raise UserError(f"{path} has no {', '.join(lacking)}: remove it, and the model is measured again")
        students[key] = student
    return Results(students, teacher)


def cells(results: Results, row: Row) -> tuple[str, ...]:
    """A row of the table. With several seeds CE and share are means, ± half the range."""
    acceptance, calibration, agreement, kl = (
        fmean(results.values(row, measure)) for measure in ("acceptance", "calibration_error", "agreement", "kl")
    )
    return (
        row.signal,
        _with_range(results.values(row, "cross_entropy"), digits=3),
        _with_range(results.shares(row), digits=0),
        f"{kl:.3f}",
        f"{acceptance:.3f}",
        f"{100 * calibration:.1f}",
        f"{100 * agreement:.1f} %",
    )


def _with_range(values: Sequence[float], *, digits: int) -> str:
    if not values:
        return "-"
    mean = f"{fmean(values):.{digits}f}"
    mean = mean.replace("-0", "0") if float(mean) == 0 else mean
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def teacher_cells(teacher: Mapping[str, Any]) -> tuple[str, ...]:
    calibration = f"{100 * teacher['calibration_error']:.1f}"
    return ("the teacher itself", f"{teacher['cross_entropy']:.3f}", "", "0", "1", calibration, "100 %")


def result_table(results: Results) -> Table:
    """A table for a terminal of 80 columns, with the share without its range."""
    printed = Table(
        box=SIMPLE_HEAD,
        padding=0,
        caption="CE, KL: nats a token of held-out text. ±: half the range of the seeds.",
        caption_justify="left",
    )
    for i, heading in enumerate(("training signal", "CE", "gap %", "KL", "accept", "calib. %", "agree")):
        printed.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for row in results.rows():
        signal, cross_entropy, share, *others = cells(results, row)
        printed.add_row(signal, cross_entropy, share.partition(" ")[0], *others)
    printed.add_row(*teacher_cells(results.teacher))
    return printed


def write_page(results: Results, folders: Mapping[Key, Path]) -> None:
    """Writes the table and the list of runs of the page, and the CSV file. `folders`: run folders."""
    described = json.loads((next(iter(folders.values())) / "recipe.json").read_text(encoding="utf-8"))
    write_csv(results, described["versions"], CSV)
    put(
        PAGE,
        "table",
        table(HEADING, [*(cells(results, row) for row in results.rows()), teacher_cells(results.teacher)], left=1),
    )
    put(PAGE, "runs", description_of_runs(results, described))


def description_of_runs(results: Results, described: Mapping[str, Any]) -> str:
    student, teacher = next(iter(results.students.values())), results.teacher
    train = described["recipe"]["train"]
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    return "\n".join(
        (
            f"* Student: {student['parameters']:,} parameters; {train['steps']:,} steps of "
            f"{train['global_batch'] * SEQUENCE:,} tokens, learning rate {train['optimizer']['learning_rate']}.",
            f"* Teacher: {teacher['parameters']:,} parameters, held-out CE {teacher['cross_entropy']:.3f}.",
            f"* Held out: {student['tokens']:,} tokens.",
            textwrap.fill(f"* {versions}.", width=118, subsequent_indent="  "),
            f"* {cpu()}, {len(os.sched_getaffinity(0))} cores.",
        )
    )


def write_csv(results: Results, versions: Mapping[str, str], path: Path) -> None:
    """A line a run, and the teacher's."""
    about = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), **versions}
    lines: list[dict[str, object]] = [
        {"row": row.name, "seed": seed} | {name: student[name] for name in MEASURES} | about
        for (row, seed), student in results.students.items()
    ]
    lines.append({"row": "teacher", "seed": ""} | {name: results.teacher[name] for name in MEASURES} | about)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
