"""Room `report`: a run folder, read with suspicion: it may be damaged, unfinished or somebody else's. It draws nothing.

Nothing here is executed or followed out of the folder, and every file has a bound. What cannot be read is left out, and
the record says so: a report of a broken run is what its owner needs most.
"""

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megadistill.config import validate_recipe
from megadistill.errors import UserError
from megadistill.events import EVENTS

Floats: TypeAlias = NDArray[np.float64]

MAX_LINE_BYTES = 1 << 20
MAX_JSON_BYTES = 16 << 20
MAX_ATTEMPTS = 10_000
LARGEST = 1e30
"""A number beyond it is none that a run logs, and no plot can show it beside others."""
LAST_SECOND = 253_402_300_799.0
"""Of the year 9999: what a date can say."""

DIAGNOSTICS = ("acceptance", "reverse_kl", "jsd")
METRICS = (
    "step", "tokens", "loss", "divergence", "kl", "student_ce", "teacher_ce", "student_entropy", "teacher_entropy",
    "agreement", "log_z", "learning_rate", "grad_norm", "seconds", "tokens_per_second", "data_seconds",
    "teacher_seconds", "mfu", "memory_bytes", "kd_weight", "ce_weight",
)  # fmt: skip


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
    """What belongs to the kind, as it was written."""

    def seconds(self, name: str) -> float:
        """A cost by name; 0 where the event does not say it."""
        value = number(self.values.get(name))
        return value if value > 0 else 0.0


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says."""

    folder: Path
    name: str
    """Short, and other than those of the runs beside it."""
    recipe: Mapping[str, Any]
    """Resolved; with today's defaults for keys that are newer than the run. Empty where there is none to read."""
    versions: Mapping[str, str]
    series: Mapping[str, Floats]
    """[steps] for each name of `METRICS` and `DIAGNOSTICS`, by step, NaN where a step does not say it."""
    events: Sequence[Event]
    """In the order of their times."""
    attempts: Sequence[Mapping[str, Any]]
    """How each was started, with its number as `number`."""
    notes: Sequence[str]
    """What could not be read."""
    modified: float
    """When the folder's logs were last written to, seconds since 1970."""

    def __len__(self) -> int:
        """Steps that are on record."""
        return len(self.series["step"])

    def has(self, name: str) -> bool:
        """Whether any step says a finite `name`."""
        return bool(np.isfinite(self.series[name]).any())

    def share(self, name: str) -> Floats:
        """[steps] what part of its step each `name`, in seconds, is."""
        seconds = self.series["seconds"]
        return self.series[name] / np.where(seconds > 0, seconds, np.nan)

    def setting(self, key: str) -> Any:
        """A key of the recipe, spelled as `--set` does; None where the recipe does not say it."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """One record a folder; a folder that is named twice is read once.

    Raises:
        UserError: there is no such folder, or it holds nothing that a run writes.
    """
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    return [read_run(folder, name) for folder, name in zip(distinct, short_names(distinct), strict=True)]


def read_run(folder: Path, name: str) -> RunRecord:
    """See `read_runs`."""
    if not folder.is_dir():
        raise UserError(f"{printable(str(folder))}: no such folder; name a run's folder (run.folder of its recipe)")
    logs = [folder / each for each in ("recipe.json", "metrics.jsonl", "events.jsonl")]
    if not any(path.is_file() for path in logs):
        raise UserError(
            f"{printable(str(folder))}: no run folder: it holds neither recipe.json nor metrics.jsonl nor events.jsonl"
        )
    notes: list[str] = []
    recipe, versions = _recipe(folder / "recipe.json", notes)
    return RunRecord(
        folder=folder,
        name=name,
        recipe=recipe,
        versions=versions,
        series=_series(folder / "metrics.jsonl", notes),
        events=_events(folder / "events.jsonl", notes),
        attempts=_attempts(folder / "attempts", notes),
        notes=notes,
        modified=max(path.stat().st_mtime for path in logs if path.is_file()),
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is damaged, or larger than any that this package writes.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def number(value: Any) -> float:
    """`value` where it is a number that can be shown, NaN otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if -LARGEST <= value <= LARGEST else math.nan


def printable(text: str) -> str:
    """`text` without what a terminal, XML or UTF-8 cannot take: control characters, halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders without the parts that they all share."""
    parts = [folder.resolve().parts for folder in folders]
    shared = 0
    while len(folders) > 1 and all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return [printable("/".join(each[shared:] if len(folders) > 1 else each[-1:])) or "/" for each in parts]


def _recipe(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    try:
        values = read_json(path)
    except FileNotFoundError:
        notes.append("no recipe.json")
        return {}, {}
    except (OSError, ValueError) as error:
        notes.append(f"recipe.json cannot be read: {printable(str(error))}")
        return {}, {}
    recipe = values.get("recipe") if isinstance(values, dict) else None
    if not isinstance(recipe, dict):
        notes.append("recipe.json holds no recipe")
        return {}, {}
    try:
        recipe = validate_recipe(recipe, source="recipe.json").snapshot()
    except UserError as error:  # another version's, or edited: shown as it stands
        notes.append(f"not a recipe of this version: {printable(str(error))}")
    versions = values.get("versions")
    said = versions.items() if isinstance(versions, dict) else ()
    return recipe, {printable(str(name)): printable(str(version)) for name, version in said}


def _lines(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """Each line's object; None for a line that is damaged, or cut short by a kill. A missing file has none.

    Read line by line, as a run of a million steps writes half a gigabyte.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(MAX_LINE_BYTES):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if values is not None or line.strip():
                yield values if isinstance(values, dict) else None


def _series(path: Path, notes: list[str]) -> dict[str, Floats]:
    columns = {name: array("d") for name in (*METRICS, *DIAGNOSTICS)}
    damaged = 0
    for line in _lines(path):
        step, tokens = (number(line.get(name)) for name in ("step", "tokens")) if line else (math.nan, math.nan)
        if line is None or not (step >= 1 and tokens >= 0):
            damaged += 1
            continue
        closer = line.get("diagnostics")
        for name in METRICS:
            columns[name].append(number(line.get(name)))
        for name in DIAGNOSTICS:
            columns[name].append(number(closer.get(name)) if isinstance(closer, dict) else math.nan)
    if damaged:
        notes.append(f"metrics.jsonl: {damaged:,} damaged {'line' if damaged == 1 else 'lines'} left out")
    series = {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}
    if len(series["step"]) > 1 and not (np.diff(series["step"]) > 0).all():
        steps, last = np.unique(series["step"][::-1], return_index=True)
        kept = len(series["step"]) - 1 - last  # of a step that was logged twice, the later line
        notes.append(
            f"metrics.jsonl: steps out of order or twice; {len(steps):,} of {len(series['step']):,} lines kept"
        )
        series = {name: column[kept] for name, column in series.items()}
    return series


def _events(path: Path, notes: list[str]) -> list[Event]:
    events, damaged = [], 0
    for line in _lines(path):
        event = _event(line) if line is not None else None
        if event is None:
            damaged += 1
        else:
            events.append(event)
    if damaged:
        notes.append(f"events.jsonl: {damaged:,} {'line' if damaged == 1 else 'lines'} damaged or unknown, left out")
    return sorted(events, key=lambda event: event.time)


def _event(line: Mapping[str, Any]) -> Event | None:
    kind = line.get("event")
    time, attempt, step = (number(line.get(name)) for name in ("time", "attempt", "step"))
    if not isinstance(kind, str) or kind not in EVENTS or not (0 <= time <= LAST_SECOND):
        return None
    values = {name: value for name, value in line.items() if name not in ("time", "attempt", "event", "step")}
    return Event(time, int(attempt) if attempt >= 0 else 0, kind, int(step) if step >= 0 else 0, values)


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
