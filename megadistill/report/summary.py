"""Room `report`: what a run came to, in a row of a table; its events, in others. It draws nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megadistill.events import EVENTS, Goodput
from megadistill.report.run_record import Floats, RunRecord
from megadistill.report.smoothing import count_text, time_text
from megadistill.report.tables import NOTHING, Table, digits, text
from megadistill.report.wall_clock import Clock, state_of, utc

LAST_STEPS = 50
"""Whose mean is a run's last value."""

ROUTINE = ("checkpoint_saved",)
"""Events that a table of what happened only counts."""

SHAPE = ("model_type", "num_hidden_layers", "hidden_size")


def summary_table(
    runs: Sequence[RunRecord], clocks: Sequence[Clock], goodputs: Sequence[Goodput], *, now: float
) -> Table:
    headings = [
        "run", "state", "objective", "student", "teacher", "steps", "tokens", "loss", "KL", "CE", "tokens/s", "MFU",
        "teacher wait", "data wait", "memory", "wall time", "goodput",
    ]  # fmt: skip
    rows = [
        [
            run.name,
            state_of(run, now=now),
            _objective(run),
            _model(run.setting("student.config")),
            _model(run.setting("teacher.path") or run.setting("teacher.targets")),
            _steps(run),
            count_text(run.series["tokens"][-1]) if len(run) else NOTHING,
            *(digits(_last(run.series[name]), ".4f") for name in ("loss", "kl", "student_ce")),
            count_text(_median(run.series["tokens_per_second"])) if run.has("tokens_per_second") else NOTHING,
            digits(_median(run.series["mfu"]), ".1%"),
            digits(_part(run, "teacher_seconds"), ".1%"),
            digits(_part(run, "data_seconds"), ".1%"),
            digits(float(np.nanmax(run.series["memory_bytes"])) / 2**30, ".3g") + " GiB"
            if run.has("memory_bytes")
            else NOTHING,
            time_text(clock.wall) if clock.wall > 0 else NOTHING,
            f"{goodput.ratio:.1%}" if goodput.wall > 0 else NOTHING,
        ]
        for run, clock, goodput in zip(runs, clocks, goodputs, strict=True)
    ]
    return _without_empty(Table(headings, rows, range(len(runs))))


def event_counts(runs: Sequence[RunRecord]) -> Table:
    """How often each kind of event was met, and what it means."""
    counts = [Counter(event.kind for event in run.events) for run in runs]
    rows = [
        [kind, *(f"{each[kind]:,}" for each in counts), meaning.replace("`", "")]
        for kind, meaning in EVENTS.items()
        if any(each[kind] for each in counts)
    ]
    return Table(["event", *(run.name for run in runs), "meaning"], rows)


def events_table(runs: Sequence[RunRecord], *, most: int) -> tuple[Table, int]:
    """The last `most` events of each run, but for the routine ones, and how many older ones are left out."""
    rows, owners, older = [], [], 0
    for index, run in enumerate(runs):
        told = [event for event in run.events if event.kind not in ROUTINE]
        older += max(0, len(told) - most)
        for event in told[-most:]:
            rows.append(
                [run.name, utc(event.time), str(event.attempt), event.kind, f"{event.step:,}", _said(event.values)]
            )
            owners.append(index)
    return Table(["run", "time", "attempt", "event", "step", "what belongs to it"], rows, owners), older


def _said(values: Mapping[str, Any]) -> str:
    return text("; ".join(f"{name} {text(value)}" for name, value in values.items() if name != "attempt_record"))


def _objective(run: RunRecord) -> str:
    objective = run.setting("objective")
    if objective != "distill":
        return text(objective)
    kept = run.setting("loss.targets.select")
    return text(f"distill: {run.setting('loss.divergence')}{f', {kept}' if kept else ''}")


def _model(said: Any) -> str:
    """A folder by its name, a configuration by its kind and size."""
    if isinstance(said, Mapping):
        kind, layers, width = (said.get(name) for name in SHAPE)
        return text(f"{kind}, {layers} x {width}" if layers and width else str(kind))
    return text(said.rstrip("/").rpartition("/")[2] or said) if isinstance(said, str) else NOTHING


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
    """What part of all its steps' seconds a run waited."""
    if not run.has(name):
        return np.nan
    seconds = np.nansum(run.series["seconds"])
    return float(np.nansum(run.series[name]) / seconds) if seconds > 0 else np.nan


def _without_empty(table: Table) -> Table:
    """Columns that say something of any run."""
    kept = [i for i in range(len(table.headings)) if any(row[i] != NOTHING for row in table.rows)]
    return Table([table.headings[i] for i in kept], [[row[i] for i in kept] for row in table.rows], table.runs)
