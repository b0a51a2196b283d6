"""Room `report`: one page on one or several runs, and its figures as files beside it. It knows no run's code.

The page needs no network and no script, and forbids itself both: what a run's folder says can be anybody's words.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megadistill import __version__
from megadistill.errors import UserError
from megadistill.report.curves import curves_over_time, curves_over_tokens
from megadistill.report.drawing import DASHES, MOST_RUNS, PALETTE, PALETTE_DARK, Drawing, style
from megadistill.report.evaluation_section import Results, read_results, results_figures
from megadistill.report.event_plot import TROUBLE, events_figure, goodput_figure
from megadistill.report.run_record import RunRecord, read_runs
from megadistill.report.smoothing import SMOOTHED_SHARE
from megadistill.report.summary import LAST_STEPS, event_counts, events_table, summary_table
from megadistill.report.tables import attempts_table, differing_keys, recipe_table, versions_table
from megadistill.report.wall_clock import clock_of, goodput_of, utc

PAGE = "report.html"
MOST_EVENTS = 200
MOST_ATTEMPTS = 20
MOST_EVALUATIONS = 50


@dataclass(frozen=True)
class Page:
    """What is written."""

    html: str
    drawings: Sequence[Drawing]


def report(runs: Sequence[Path], *, evaluations: Sequence[Path], output: Path | None, now: float) -> Path:
    """Writes the page on the runs in these folders, and returns where it is; `now` is in seconds since 1970.

    `output` is an .html file or a folder; None stands for the folder of the one run. The figures are PNG files in a
    folder named like the page, without its ending. Both are replaced whole.

    Raises:
        UserError: a folder holds no run, a file no evaluations, or it is not clear where the page belongs.
    """
    if output is None and len(runs) != 1:
        raise UserError(f"{len(runs)} runs, one page: say where it goes, as in --output runs/{PAGE}")
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs: no reader tells more than {MOST_RUNS} lines apart; name fewer")
    where = output if output is not None else runs[0]
    path = where if where.suffix == ".html" and not where.is_dir() else where / PAGE
    records = read_runs(runs)
    results = [read_results(each, name=each.name) for each in evaluations]
    write(compose(records, results, now=now), path)
    return path


def compose(runs: Sequence[RunRecord], results: Sequence[Results], *, now: float) -> Page:
    """The page, not yet written."""
    clocks = [clock_of(run) for run in runs]
    goodputs = [goodput_of(run, clock) for run, clock in zip(runs, clocks, strict=True)]
    results, unread = _with_results_beside(runs, results)
    eventful = any(run.events for run in runs)
    with style():
        over_tokens, over_time = curves_over_tokens(runs), curves_over_time(runs, clocks)
        happened = [events_figure(runs, clocks), goodput_figure(runs, goodputs)] if eventful else []
        measured = [results_figures(each, f"evaluation-{index}") for index, each in enumerate(results, 1)]
    events, older = events_table(runs, most=MOST_EVENTS)
    html = _environment().get_template("report.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        version=__version__,
        now=utc(now),
        runs=runs,
        colours=list(zip(PALETTE, PALETTE_DARK, strict=True)),
        palette=len(PALETTE),
        strokes=[" ".join(map(str, dash[1])) if isinstance(dash, tuple) else "" for dash in DASHES],
        summary=summary_table(runs, clocks, goodputs, now=now),
        notes=[(run.name, note) for run in runs for note in run.notes] + unread,
        last_steps=LAST_STEPS,
        smoothed_share=SMOOTHED_SHARE,
        trouble=[kind for kind in TROUBLE if any(event.kind == kind for run in runs for event in run.events)],
        over_tokens=over_tokens,
        over_time=over_time,
        happened=happened,
        counts=event_counts(runs),
        events=events,
        older=older,
        results=list(zip(results, measured, strict=True)),
        differing=differing_keys(runs) if len(runs) > 1 else None,
        recipes=[(run.name, recipe_table(run)) for run in runs if run.recipe],
        versions=versions_table(runs),
        attempts=attempts_table(runs, most=MOST_ATTEMPTS),
    )  # fmt: skip
    return Page(html, [*over_tokens, *over_time, *happened, *(each for group in measured for each in group)])


def write(page: Page, path: Path) -> None:
    """The figures first: a page that is there has its figures beside it."""
    folder = path.with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=path.parent))
    try:
        for drawing in page.drawings:
            (fresh / f"{drawing.name}.png").write_bytes(drawing.png)
        (fresh / path.name).write_text(page.html, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for stale in {each.name for each in folder.glob("*.png")} - {
            f"{drawing.name}.png" for drawing in page.drawings
        }:
            (folder / stale).unlink()
        for drawing in page.drawings:
            os.replace(fresh / f"{drawing.name}.png", folder / f"{drawing.name}.png")
        os.replace(fresh / path.name, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _with_results_beside(
    runs: Sequence[RunRecord], results: Sequence[Results]
) -> tuple[list[Results], list[tuple[str, str]]]:
    """The evaluations in the run folders, then those that were asked for; and which of the former cannot be read."""
    beside, unread = [], []
    for run in runs:
        for path in sorted(run.folder.glob("evaluation*.json"))[:MOST_EVALUATIONS]:
            try:
                beside.append(read_results(path, name=f"{run.name}/{path.name}"))
            except UserError as error:
                unread.append((run.name, str(error)))
    return [*beside, *results], unread


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("megadistill.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # our own figures alone, whose text is escaped
    return environment
