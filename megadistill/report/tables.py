"""Tables of a page: headings, and rows of text."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from megadistill.config.load import dotted
from megadistill.redaction import printable, without_secrets
from megadistill.report.run_record import RunRecord
from megadistill.report.wall_clock import utc

MAX_CELL = 600
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    runs: Sequence[int] | None = None
    """Index of each row's run; None where rows belong to no run."""


def text(value: Any) -> str:
    """A value of a recipe or an event as one line of bounded length, without secrets."""
    if value is None:
        return NOTHING
    line = without_secrets(value if isinstance(value, str) else json.dumps(value, default=str))
    line = printable(" ".join(line[: 2 * MAX_CELL].split()))
    return line if len(line) <= MAX_CELL else line[:MAX_CELL] + "…"


def digits(value: float, form: str) -> str:
    """A number in a format; `NOTHING` where it is not finite."""
    return format(value, form) if math.isfinite(value) else NOTHING


def differing_keys(runs: Sequence[RunRecord]) -> Table:
    """The recipe keys whose values differ between runs, without the folder; a column a run."""
    flat = [dotted(run.recipe) if run.recipe else {} for run in runs]
    keys = sorted({key for each in flat for key in each if key != "run.folder"})
    rows = [
        [printable(key), *(text(each[key]) if key in each else NOTHING for each in flat)]
        for key in keys
        if len({json.dumps(each.get(key), default=str) for each in flat}) > 1
    ]
    return Table(["key", *(run.name for run in runs)], rows)


def recipe_table(run: RunRecord) -> Table:
    return Table(["key", "value"], [[printable(key), text(value)] for key, value in dotted(run.recipe).items()])


def versions_table(runs: Sequence[RunRecord]) -> Table:
    """Package versions of each run, by its newest attempt or its recipe.json."""
    line = [_versions(run) for run in runs]
    names = list(dict.fromkeys(name for each in line for name in each))
    return Table(
        ["package", *(run.name for run in runs)],
        [[name, *(each.get(name, NOTHING) for each in line)] for name in names],
    )


def attempts_table(runs: Sequence[RunRecord], *, limit: int) -> Table:
    """The newest attempts of each run."""
    rows, owners = [], []
    for index, run in enumerate(runs):
        for record in run.attempts[-limit:]:
            command = record.get("command")
            line = " ".join(str(part) for part in command) if isinstance(command, list) else ""
            values = (record["number"], _moment(record.get("time")), record.get("host"), record.get("world"), line)
            rows.append([run.name, *map(text, values)])
            owners.append(index)
    return Table(["run", "attempt", "started", "host", "ranks", "command"], rows, owners)


def _moment(value: Any) -> Any:
    """A time of an attempt's record as the page writes times; what is none, unchanged."""
    try:
        return utc(datetime.fromisoformat(value).timestamp())
    except (TypeError, ValueError, OverflowError):
        return value


def _versions(run: RunRecord) -> dict[str, str]:
    for record in reversed(run.attempts):
        versions = record.get("versions")
        if isinstance(versions, dict):
            return {text(str(name)): text(version) for name, version in versions.items()}
    return dict(run.versions)
