"""Tables of the results and of the events of runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megadistill.events import Goodput
from megadistill.report.event_words import MEANINGS, sentences
from megadistill.report.run_record import Floats, RunRecord
from megadistill.report.tables import NOTHING, Table, digits, text
from megadistill.report.wall_clock import Clock, state_of, utc
from megadistill.units import count, readable, short, spell

LAST_STEPS = 50
"""Number of steps whose mean is a run's last value."""

SHAPE = ("model_type", "num_hidden_layers", "hidden_size")


def summary_table(
    runs: Sequence[RunRecord], clocks: Sequence[Clock], goodputs: Sequence[Goodput], *, now: float
) -> Table:
    headings = [
        "run", "state", "objective", "student", "teacher", "steps", "tokens", "loss", "KL", "CE", "tokens/s", "MFU",
        "student MFU", "teacher MFU", "teacher wait", "data wait", "memory", "wall time", "goodput",
    ]  # fmt: skip
    rows = [
        [
            run.name,
            state_of(run, now=now),
            _objective(run),
            _model(run.setting("student.config")),
            _model(run.setting("teacher.path") or run.setting("teacher.targets")),
            _steps(run),
            count(run.series["tokens"][-1]) if len(run) else NOTHING,
            *(digits(_last(run.series[name]), ".4f") for name in ("loss", "kl", "student_ce")),
            short(_median(run.series["tokens_per_second"])) if run.has("tokens_per_second") else NOTHING,
            *(digits(_median(run.series[name]), ".1%") for name in ("mfu", "student_mfu", "teacher_mfu")),
            digits(_part(run, run.teacher_wait), ".1%"),
            digits(_part(run, "data_seconds"), ".1%"),
            readable(np.nanmax(run.series["memory_bytes"]), "B") if run.has("memory_bytes") else NOTHING,
            spell(clock.wall) if clock.wall > 0 else NOTHING,
            f"{goodput.ratio:.1%}" if goodput.wall > 0 else NOTHING,
        ]
        for run, clock, goodput in zip(runs, clocks, goodputs, strict=True)
    ]
    return _without_empty(Table(headings, rows, range(len(runs))))


def measured_mfu(run: RunRecord) -> str:
    """The options with which `megadistill plan` expects the MFU that this run measured; empty where it has none."""
    names = [name for name in ("student_mfu", "teacher_mfu") if run.has(name)]
    return " ".join(f"--{name.replace('_', '-')} {_median(run.series[name]):.3g}" for name in names)


def event_counts(runs: Sequence[RunRecord]) -> Table:
    """Number of events of each kind, and its meaning."""
    counts = [Counter(event.kind for event in run.events) for run in runs]
    rows = [
        [kind.replace("_", " "), *(f"{each[kind]:,}" if each[kind] else NOTHING for each in counts), meaning]
        for kind, meaning in MEANINGS.items()
        if any(each[kind] for each in counts)
    ]
    return Table(["event", *(run.name for run in runs), "meaning"], rows)


def events_table(runs: Sequence[RunRecord], *, limit: int) -> tuple[Table, int]:
    """The last `limit` sentences on the events of each run, and the number of older ones."""
    rows, owners, older = [], [], 0
    for index, run in enumerate(runs):
        described = sentences(run)
        older += max(0, len(described) - limit)
        for each in described[-limit:]:
            rows.append([run.name, utc(each.event.time), each.text])
            owners.append(index)
    return Table(["run", "time", "event"], rows, owners), older


def _objective(run: RunRecord) -> str:
    objective = run.setting("objective")
    if objective != "distill":
        return text(objective)
    selection = run.setting("loss.targets.select")
    return text(f"distill: {run.setting('loss.divergence')}{f', {selection}' if selection else ''}")


def _model(folder_or_config: Any) -> str:
    """Name of a folder; kind and size of a configuration."""
    if isinstance(folder_or_config, Mapping):
        kind, layers, width = (folder_or_config.get(name) for name in SHAPE)
        return text(f"{kind}, {layers} × {width}" if layers and width else str(kind))
    if isinstance(folder_or_config, str):
        return text(folder_or_config.rstrip("/").rpartition("/")[2] or folder_or_config)
    return NOTHING


def _steps(run: RunRecord) -> str:
    taken, planned = f"{int(run.series['step'][-1]) if len(run) else 0:,}", run.setting("train.steps")
    return f"{taken} of {planned:,}" if isinstance(planned, int) else taken


def _last(values: Floats) -> float:
    known = values[-LAST_STEPS:][np.isfinite(values[-LAST_STEPS:])]
    return float(known.mean()) if len(known) else np.nan


def _median(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else np.nan


def _part(run: RunRecord, name: str) -> float:
    """Fraction of the time of all steps that a run waited."""
    seconds = np.nansum(run.series["seconds"])
    return float(np.nansum(run.series[name]) / seconds) if run.has(name) and seconds > 0 else np.nan


def _without_empty(table: Table) -> Table:
    """The columns that have a value for any run."""
    columns = [i for i in range(len(table.headings)) if any(row[i] != NOTHING for row in table.rows)]
    return Table([table.headings[i] for i in columns], [[row[i] for i in columns] for row in table.rows], table.runs)
