"""The page on one or several runs, and its figures as files beside it.

The page needs no network and no script, and forbids itself both: the text in a run's folder can be anybody's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from megadistill import __version__
from megadistill.errors import UserError
from megadistill.evaluate.checkpoint_scores import read_scores
from megadistill.evaluate.evaluation import read_evaluations
from megadistill.io import write_file
from megadistill.outputs import require_writable_folder
from megadistill.redaction import printable
from megadistill.report.curves import curves_over_time, curves_over_tokens
from megadistill.report.drawing import DASHES, MAX_RUNS, PALETTE, PALETTE_DARK, Drawing, style
from megadistill.report.event_plot import TROUBLE, events_figure, goodput_figure
from megadistill.report.run_record import RunRecord, read_runs
from megadistill.report.save_interval import measured_saves
from megadistill.report.sections.checkpoint_section import checkpoint_samples, checkpoint_scores, score_curves
from megadistill.report.sections.evaluation_section import Results
from megadistill.report.sections.group_section import group_curves, group_table, groups_of
from megadistill.report.sections.validation_section import validation_curves, validation_table, validations_of
from megadistill.report.smoothing import SMOOTHED_SHARE
from megadistill.report.summary import LAST_STEPS, event_counts, events_table, measured_mfu, summary_table
from megadistill.report.tables import NOTHING, attempts_table, differing_keys, recipe_table, versions_table
from megadistill.report.wall_clock import clock_of, goodput_of, utc

PAGE = "report.html"
MAX_EVENTS = 200
MAX_ATTEMPTS = 20
MAX_EVALUATIONS = 50


@dataclass(frozen=True)
class Page:
    """A page and its figures."""

    html: str
    drawings: Sequence[Drawing]


def report(runs: Sequence[Path], *, evaluations: Sequence[Path], output: Path | None, now: float) -> Path:
    """Writes the page on the runs in these folders, and returns its path; `now` is in seconds since 1970.

    `output` is an .html file or a folder; None stands for the folder of the one run. The figures are PNG files in a
    folder named like the page, without its ending. Both are replaced whole.

    Raises:
        UserError: a folder holds no run, a file no evaluations, several runs have no `output`, or it is in a file.
    """
    if output is None and len(runs) != 1:
        raise UserError(f"a page on {len(runs)} runs has no folder of its own: give one, as in --output runs/{PAGE}")
    if len(runs) > MAX_RUNS:
        raise UserError(f"{len(runs)} runs: a chart can show {MAX_RUNS} lines at most; name fewer")
    target = output if output is not None else runs[0]
    path = target if target.suffix == ".html" and not target.is_dir() else target / PAGE
    there = next(each for each in (path, *path.parents) if each.exists())
    if there.is_file() and there != path:
        raise UserError(f"{printable(str(there))} is a file: give --output a folder, or a name that ends in .html")
    records = read_runs(runs)
    require_writable_folder(path.parent, "--output" if output is not None else "RUN", given=path)
    results = [Results(printable(each.name), read_evaluations(each)) for each in evaluations]
    write(compose(records, results, now=now), path)
    return path


def compose(runs: Sequence[RunRecord], results: Sequence[Results], *, now: float) -> Page:
    """The page, without writing it."""
    clocks = [clock_of(run) for run in runs]
    goodputs = [goodput_of(run, clock) for run, clock in zip(runs, clocks, strict=True)]
    results, unread = _with_results_beside(runs, results)
    eventful = any(run.events for run in runs)
    notes = [list[str]() for _ in runs]
    validations = [validations_of(run, note) for run, note in zip(runs, notes, strict=True)]
    followed = [read_scores(run.folder, note) for run, note in zip(runs, notes, strict=True)]
    unread += [(run.name, line) for run, note in zip(runs, notes, strict=True) for line in note]
    groups = [groups_of(run) for run in runs]
    with style():
        validated = validation_curves(runs, validations)
        over_tokens, over_time = curves_over_tokens(runs), curves_over_time(runs, clocks)
        grouped = group_curves(runs, groups)
        happened = [events_figure(runs, clocks), goodput_figure(runs, goodputs)] if eventful else []
        scored = score_curves(runs, followed)
        measured = [each.figures(f"evaluation-{index}") for index, each in enumerate(results, 1)]
    events, older = events_table(runs, limit=MAX_EVENTS)
    html = _environment().get_template("report.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        version=__version__,
        now=utc(now),
        runs=runs,
        colours=list(zip(PALETTE, PALETTE_DARK, strict=True)),
        palette=len(PALETTE),
        nothing=NOTHING,
        strokes=[" ".join(map(str, dash[1])) if isinstance(dash, tuple) else "" for dash in DASHES],
        summary=summary_table(runs, clocks, goodputs, now=now),
        measured_saves=[(run.name, str(saves)) for run in runs if (saves := measured_saves(run))],
        measured_mfus=[(run.name, options) for run in runs if (options := measured_mfu(run))],
        notes=[(run.name, note) for run in runs for note in run.notes] + unread,
        last_steps=LAST_STEPS,
        smoothed_share=SMOOTHED_SHARE,
        trouble=[kind for kind in TROUBLE if any(event.kind == kind for run in runs for event in run.events)],
        over_tokens=over_tokens,
        grouped=grouped,
        groups=group_table(runs, groups),
        over_time=over_time,
        validated=validated,
        validation=validation_table(runs, validations),
        happened=happened,
        counts=event_counts(runs),
        events=events,
        older=older,
        scores=checkpoint_scores(runs, followed),
        scored=scored,
        samples=checkpoint_samples(runs, followed),
        results=list(zip(results, measured, strict=True)),
        differing=differing_keys(runs) if len(runs) > 1 else None,
        recipes=[(run.name, recipe_table(run)) for run in runs if run.recipe],
        versions=versions_table(runs),
        attempts=attempts_table(runs, limit=MAX_ATTEMPTS),
    )  # fmt: skip
    curves = [*over_tokens, *grouped, *validated, *over_time, *happened, *scored]
    return Page(html, [*curves, *(each for group in measured for each in group)])


def write(page: Page, path: Path) -> None:
    """Writes the figures, then the page: a page that is there has its figures beside it."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in page.drawings:
        write_file(folder / f"{drawing.name}.png", drawing.png)
    for stale in {each.stem for each in folder.glob("*.png")} - {drawing.name for drawing in page.drawings}:
        (folder / f"{stale}.png").unlink()
    write_file(path, page.html)


def _with_results_beside(
    runs: Sequence[RunRecord], results: Sequence[Results]
) -> tuple[list[Results], list[tuple[str, str]]]:
    """The evaluations in the run folders, then `results`; and which of the former cannot be read."""
    beside, unread = [], []
    for run in runs:
        for path in sorted(run.folder.glob("evaluation*.json"))[:MAX_EVALUATIONS]:
            try:
                beside.append(Results(printable(f"{run.name}/{path.name}"), read_evaluations(path)))
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
    environment.filters["breakable"] = _breakable
    environment.filters["printable"] = printable
    return environment


def _breakable(line: str) -> Markup:
    """Text that a browser breaks between the words of a path, a key or a name, and not within one."""
    return Markup(re.sub(r"(?<=\w)([./_=])(?=[^\W\d]{2})", r"\1<wbr>", str(escape(line))))
