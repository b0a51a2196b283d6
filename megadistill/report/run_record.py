"""A run folder, read without trust: it may be damaged, incomplete or from anybody.

Nothing here is executed or followed out of the folder, and every file has a bound. Unreadable parts are left out and
noted: a report of a broken run is the one that its owner needs most.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megadistill.config.load import validate_recorded
from megadistill.config.paths import wrong_path
from megadistill.errors import UserError
from megadistill.events import EVENTS, RENAMED_EVENTS, is_event, json_lines
from megadistill.heldout.splits import short_names
from megadistill.io import read_json
from megadistill.redaction import printable
from megadistill.units import number_of

Floats: TypeAlias = NDArray[np.float64]

MAX_ATTEMPTS = 10_000
MAX_NAME = 40
LARGEST = 1e30
"""Bound of a number: a larger one is damage, and no plot can show it beside others."""
LAST_SECOND = 253_402_300_799.0
"""End of the year 9999 in seconds since 1970, the last that a date can hold."""

NESTED = {
    "diagnostics": ("acceptance", "reverse_kl", "jsd"),
    "experts": ("max_load", "min_load", "idle", "router_aux_loss"),
}
"""Names of numbers that a line of metrics.jsonl has inside of an object, by its name."""
METRICS = (
    "time", "step", "tokens", "loss", "divergence", "targets_kl", "kl", "student_ce", "teacher_ce", "student_entropy",
    "teacher_entropy", "agreement", "log_z", "learning_rate", "grad_norm", "seconds", "tokens_per_second",
    "data_seconds", "student_seconds", "loss_seconds", "teacher_seconds", "wait_seconds", "mfu", "student_mfu",
    "teacher_mfu", "memory_bytes", "kd_weight", "ce_weight",
)  # fmt: skip
SERIES = (*METRICS, *chain.from_iterable(NESTED.values()))
"""Names of all numbers that are read of a step."""


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl."""

    time: float
    """Seconds since 1970."""
    attempt: int
    kind: str
    """A name of `EVENTS`."""
    step: int
    values: Mapping[str, Any]
    """The event's other keys, as written."""

    def seconds(self, name: str) -> float:
        """A cost by its key; 0 where the event has none."""
        value = number(self.values.get(name))
        return value if value > 0 else 0.0


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder."""

    folder: Path
    name: str
    """Short name, which differs from those of the runs beside it."""
    recipe: Mapping[str, Any]
    """The resolved recipe, with today's defaults for keys that are newer than the run; empty if unreadable."""
    versions: Mapping[str, str]
    series: Mapping[str, Floats]
    """[steps] for each name of `SERIES`, in the order of steps, NaN where a step has none."""
    events: Sequence[Event]
    """Events in the order of their times."""
    attempts: Sequence[Mapping[str, Any]]
    """Record of each attempt, with its number as `number`."""
    notes: Sequence[str]
    """Descriptions of unreadable parts."""
    modified: float
    """Time of the last write to the folder's logs, in seconds since 1970."""

    def __len__(self) -> int:
        """Number of logged steps."""
        return len(self.series["step"])

    def has(self, name: str) -> bool:
        """Whether any step has a finite `name`."""
        return bool(np.isfinite(self.series[name]).any())

    def share(self, name: str) -> Floats:
        """[steps] fraction of each step's time that `name`, in seconds, took."""
        seconds = self.series["seconds"]
        return self.series[name] / np.where(seconds > 0, seconds, np.nan)

    @property
    def teacher_wait(self) -> str:
        """The name of the seconds that a run waited for its teacher: a former version measured no waits of their own,
        but with them the work of rank 0's own stage."""
        return "wait_seconds" if self.has("wait_seconds") else "teacher_seconds"

    def setting(self, key: str) -> Any:
        """The value of a recipe key, spelled as in `--set`; None where the recipe has none."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """One record for each folder; a folder that is named twice is read once.

    Raises:
        UserError: there is no such folder, or it holds nothing that a run writes.
    """
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    names = distinct_names(list(map(printable, short_names([folder.resolve().parts for folder in distinct]))))
    return [read_run(folder, name) for folder, name in zip(distinct, names, strict=True)]


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names of at most `MAX_NAME` characters; of longer ones, the part in which they differ and what is around it."""
    first, last = _alike(names), _alike([name[::-1] for name in names])
    if len(names) == 1:
        first, last = len(names[0]), 0
    return [_part(name, first, max(first, len(name) - last)) for name in names]


def _alike(names: Sequence[str]) -> int:
    """Number of characters with which all names begin."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*names, strict=False)))


def _part(name: str, begin: int, end: int) -> str:
    """`MAX_NAME` characters of a name, with those of begin to end in the middle."""
    if len(name) <= MAX_NAME:
        return name
    first = min(max(0, (begin + end - MAX_NAME) // 2), len(name) - MAX_NAME)
    part = name[first : first + MAX_NAME]
    return ("…" + part[1:] if first else part[:-1] + "…") if first in (0, len(name) - MAX_NAME) else f"…{part[1:-1]}…"


def read_run(folder: Path, name: str) -> RunRecord:
    """See `read_runs`."""
    if not folder.is_dir():
        if reason := wrong_path(folder, "run"):
            raise UserError(reason)
        raise UserError(f"{printable(str(folder))}: no such folder; name a run's folder (run.folder of its recipe)")
    logs = [folder / each for each in ("recipe.json", "metrics.jsonl", "events.jsonl")]
    if not any(path.is_file() for path in logs):
        if reason := wrong_path(folder, "run"):
            raise UserError(reason)
        raise UserError(f"{printable(str(folder))}: not a run folder (no recipe.json, metrics.jsonl or events.jsonl)")
    notes: list[str] = []
    recipe, versions = _recipe(folder / "recipe.json", notes)
    series = dict(_series(folder / "metrics.jsonl", notes))
    _rename_sparse_kl(series, recipe)
    return RunRecord(
        folder=folder,
        name=name,
        recipe=recipe,
        versions=versions,
        series=series,
        events=_events(folder / "events.jsonl", notes),
        attempts=_attempts(folder / "attempts", notes),
        notes=notes,
        modified=max(path.stat().st_mtime for path in logs if path.is_file()),
    )


def number(value: Any) -> float:
    """`value` if it is a number of at most `LARGEST`, else NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if -LARGEST <= value <= LARGEST else math.nan


def _recipe(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        notes.append("no recipe.json" if missing else f"recipe.json cannot be read: {printable(str(error))}")
        return {}, {}
    recipe = values.get("recipe") if isinstance(values, dict) else None
    if not isinstance(recipe, dict):
        notes.append("recipe.json holds no recipe")
        return {}, {}
    try:
        recipe = validate_recorded(recipe, source="recipe.json").snapshot()
    except UserError as error:  # of another version, or edited: shown unchanged
        notes.append(f"not a recipe of this version: {printable(str(error))}")
    versions = values.get("versions")
    items = versions.items() if isinstance(versions, dict) else ()
    return recipe, {printable(str(name)): printable(str(version)) for name, version in items}


def _series(path: Path, notes: list[str]) -> dict[str, Floats]:
    columns = {name: array("d") for name in SERIES}
    damaged = 0
    for line in json_lines(path):
        step, tokens = (number(line.get(name)) for name in ("step", "tokens")) if line else (math.nan, math.nan)
        if line is None or not (step >= 1 and tokens >= 0):
            damaged += 1
            continue
        for name in METRICS:
            columns[name].append(number(line.get(name)))
        for group, names in NESTED.items():
            values = line.get(group)
            for name in names:
                columns[name].append(number(values.get(name)) if isinstance(values, dict) else math.nan)
    if damaged:
        notes.append(f"metrics.jsonl: {number_of(damaged, 'damaged line')} left out")
    series = {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}
    if len(series["step"]) > 1 and not (np.diff(series["step"]) > 0).all():
        steps, last = np.unique(series["step"][::-1], return_index=True)
        later = len(series["step"]) - 1 - last  # of a step that was logged twice, the later line
        notes.append(
            f"metrics.jsonl: steps out of order or twice; {len(steps):,} of {len(series['step']):,} lines kept"
        )
        series = {name: column[later] for name, column in series.items()}
    return series


def _rename_sparse_kl(series: dict[str, Floats], recipe: Mapping[str, Any]) -> None:
    """Moves the `kl` of steps that an older version logged, where it was the divergence from truncated targets."""
    loss = recipe.get("loss")
    if isinstance(loss, Mapping) and loss.get("targets"):
        older = np.isfinite(series["kl"]) & np.isnan(series["targets_kl"])
        series["targets_kl"] = np.where(older, series["kl"], series["targets_kl"])
        series["kl"] = np.where(older, np.nan, series["kl"])


def _events(path: Path, notes: list[str]) -> list[Event]:
    events, damaged, former = [], 0, set[str]()
    for line in json_lines(path):
        former |= {str(line.get("event"))} & RENAMED_EVENTS.keys() if line is not None else set()
        event = _event(line) if line is not None else None
        if event is None:
            damaged += 1
        else:
            events.append(event)
    if damaged:
        notes.append(f"events.jsonl: {number_of(damaged, 'line')} damaged or unknown, left out")
    notes += [f"events.jsonl: {name} is now {RENAMED_EVENTS[name]}, and left out" for name in sorted(former)]
    caused = {each.attempt for each in events if each.kind == "attempt_failed" and not each.values.get("lost_peer")}
    named = (each for each in events if not (each.values.get("lost_peer") and each.attempt in caused))
    return sorted(named, key=lambda event: event.time)


def _event(line: Mapping[str, Any]) -> Event | None:
    kind = line.get("event")
    if not is_event(line) or kind not in EVENTS or not (0 <= number(line["time"]) <= LAST_SECOND):
        return None
    values = {name: value for name, value in line.items() if name not in ("time", "attempt", "event", "step")}
    return Event(float(line["time"]), line["attempt"], str(kind), line["step"], values)


def _attempts(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        paths = sorted(path for path in folder.glob("*.json") if path.stem.isascii() and path.stem.isdigit())
    except OSError as error:
        notes.append(f"attempts cannot be read: {printable(str(error))}")
        return []
    records, unread = [], 0
    for path in paths[-MAX_ATTEMPTS:]:
        try:
            record = read_json(path)
        except (OSError, ValueError):
            record = None
        unread += not isinstance(record, dict)
        records.append({**(record if isinstance(record, dict) else {}), "number": int(path.stem)})
    if unread:
        notes.append(f"attempts: {unread:,} of {len(records):,} records cannot be read")
    return records
