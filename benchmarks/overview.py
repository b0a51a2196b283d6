"""The last measurements of loss, stream, teacher and step, and their machine, as one page; those of ranks on another.

python -m benchmarks.overview      writes the tables of docs/results/benchmarks.md and docs/scale.md from
                                   benchmarks/results/*.csv
"""

import csv
import sys
from collections.abc import Sequence

from benchmarks.markdown import put
from benchmarks.report import ROOT
from megadistill.errors import UserError
from megadistill.export.markdown import table

PAGE = ROOT / "docs/results/benchmarks.md"
RESULTS = ROOT / "benchmarks/results"
SUBJECTS = ("loss", "stream", "teacher", "step", "scale")
PAGES = {"scale": ROOT / "docs/scale.md"}
"""Pages of subjects that are not on `PAGE`."""
FIGURES = {"step": ("step-growth.png", "Time a token of a step and of its products, by sequence and by vocabulary")}
"""Subject -> file of its figure, beside the page, and its description."""
NOT_MEASURED = "Not measured yet: this part of the page waits for a quiet machine."

Line = dict[str, str]


def newest(lines: Sequence[Line]) -> list[Line]:
    """The lines of the last run of each question and shape: a run appends its lines."""
    last = {(line["question"], line["shape"]): (line["date"], line["commit"]) for line in lines}
    by_contender = {
        (line["question"], line["shape"], line["contender"]): line
        for line in lines
        if (line["date"], line["commit"]) == last[line["question"], line["shape"]]
    }
    return list(by_contender.values())


def tables(lines: Sequence[Line]) -> str:
    """A heading, a table and the machine for each question and shape."""
    parts = []
    for question, shape in dict.fromkeys((line["question"], line["shape"]) for line in lines):
        these = [line for line in lines if (line["question"], line["shape"]) == (question, shape)]
        parts += [f"### {question}: {shape}", _table(these), _about(these[0])]
    return "\n\n".join(parts)


def _table(lines: Sequence[Line]) -> str:
    return table(
        ("", "median", "lowest to highest", "ratio", "to"),
        [
            (
                line["contender"],
                amount(float(line["median"]), line["unit"]),
                "" if line["repeats"] == "1" else f"{_bare(line, 'low')} to {_bare(line, 'high')}",
                f"{float(line['ratio']):.2f}" if line["ratio"] else "",
                line["ratio_to"],
            )
            for line in lines
        ],
        left=1,
    )


def _about(line: Line) -> str:
    rounds = "once" if line["repeats"] == "1" else f"{line['repeats']} rounds"
    return (
        f"{line['date']}, commit {line['commit']}; {line['cpu']}, {line['cores']} cores, {line['threads']} threads; "
        f"Python {line['python']}, torch {line['torch']}; {rounds}."
    )


def _bare(line: Line, column: str) -> str:
    return amount(float(line[column]), line["unit"])


def amount(value: float, unit: str) -> str:
    """Three or four digits, in a unit of suitable size."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit == "relative":
        return f"{value:.1e}"
    if unit == "s a token":
        return f"{value * 1e6:,.4g} µs a token"
    if unit.endswith("s") and value < 0.1:
        return f"{value * 1e3:.3g} {unit.removesuffix('s')}ms"
    return f"{value:.3g} {unit}"


def _measured(subject: str) -> str:
    """The tables of a subject, and its figure."""
    results = RESULTS / f"{subject}.csv"
    if not results.exists():
        return NOT_MEASURED
    with results.open(encoding="utf-8", newline="") as stream:
        text = tables(newest(list(csv.DictReader(stream))))
    has_figure = subject in FIGURES and (ROOT / "docs/results" / FIGURES[subject][0]).exists()
    return f"{text}\n\n![{FIGURES[subject][1]}]({FIGURES[subject][0]})" if has_figure else text


def main() -> None:
    try:
        for subject in SUBJECTS:
            put(PAGES.get(subject, PAGE), subject, _measured(subject))
    except UserError as error:
        print(f"overview: {error}", file=sys.stderr)
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
