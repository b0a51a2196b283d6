"""The Markdown page of a run, docs/results/gpu.md, or what it says before there is one."""

from collections.abc import Sequence

from tests.gpu.checks import CHECKS, Check
from tests.gpu.results import NOT_RUN, Outcome, Results, shown

INTRODUCTION = """\
# On one GPU

`make gpu` writes this page, and `gpu.json` with all figures into `benchmarks/results/`: checks and measurements on one
NVIDIA GPU, in ten minutes at most. With `OUT=FOLDER` both go there. The machine needs torch, triton, transformers and
numpy, and no network:

    make gpu-wheels GPU_PYTHON=3.12    # where there is a network: the other packages, into wheels-gpu/
    make gpu                           # on the machine with the GPU, which has the tree and wheels-gpu/
    make gpu STAND_IN=1                # anywhere: the same code on a CPU, at tiny sizes; its figures mean nothing
"""

WAITING = "Nothing has been measured yet: this page waits for a GPU."
STAND_IN = "**A CPU stood in for the device: these figures show that the code runs, and nothing about a GPU.**"

FACTS = ("", "")
OVERVIEW = ("check", "question", "limit, s", "result")
BARS = ("case", "figure", "bar")
FIGURES = ("case", "figure", "measured", "bar")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def waiting_page() -> str:
    """The page without a run: the questions and their bars."""
    parts = [INTRODUCTION, WAITING + "\n", table(OVERVIEW, [_overview_row(check, None) for check in CHECKS])]
    for check in CHECKS:
        bars = [(bar.case.replace("*", "…"), bar.figure.replace("*", "…"), str(bar)) for bar in check.bars]
        rows = bars or [("", "measurements alone", "")]
        parts += [f"## {check.name}\n", table(BARS, rows)]
    return "\n".join(parts)


def page(results: Results) -> str:
    """The page of a run, or of the part of it that is done."""
    outcomes = {outcome.name: outcome for outcome in results.outcomes}
    facts = {**results.device, "commit": results.commit, "date": results.date}
    parts = [INTRODUCTION, *([STAND_IN + "\n"] if results.stand_in else []), table(FACTS, list(facts.items()))]
    parts.append(table(OVERVIEW, [_overview_row(check, outcomes.get(check.name)) for check in CHECKS]))
    for check in CHECKS:
        outcome = outcomes.get(check.name, Outcome(check.name, NOT_RUN, "not reached"))
        parts += [f"## {check.name}\n", table(FIGURES, _figure_rows(check, outcome, stand_in=results.stand_in))]
    return "\n".join(parts)


def _overview_row(check: Check, outcome: Outcome | None) -> tuple[str, ...]:
    if outcome is None:
        return check.name, check.question, f"{check.seconds:.0f}", "waits for a GPU"
    reason = f": {outcome.reason.splitlines()[0]}" if outcome.reason else ""
    return check.name, check.question, f"{check.seconds:.0f}", f"{outcome.state} in {outcome.seconds:.0f} s{reason}"


def _figure_rows(check: Check, outcome: Outcome, *, stand_in: bool) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for row in outcome.rows:
        bar = check.bar(row.case, row.figure)
        met = bar is None or row.value is None or (stand_in and bar.of_a_gpu) or bar.is_met(row.value)
        value = shown(row) if met else f"**{shown(row)}**"
        rows.append((row.case, row.figure, value, "" if bar is None else str(bar)))
    return rows or [("", "nothing measured", "", "")]
