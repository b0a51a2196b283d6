"""Room `report`: tables as a page shows them: headings, and rows of text. It knows no HTML."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megadistill.config import dotted
from megadistill.redaction import without_secrets
from megadistill.report.run_record import RunRecord, printable

LONGEST_CELL = 600
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    runs: Sequence[int] | None = None
    """Which run each row belongs to; None where rows belong to none."""


def text(value: Any) -> str:
    """A value of a recipe or of an event as one line, without the secrets of a URL: pages are passed around."""
    if value is None:
        return NOTHING
    said = without_secrets(value if isinstance(value, str) else json.dumps(value, default=str))
    said = printable(" ".join(said[: 2 * LONGEST_CELL].split()))
    return said if len(said) <= LONGEST_CELL else said[:LONGEST_CELL] + "…"


def digits(value: float, form: str) -> str:
    """A number in a format; a dash where there is none."""
    return format(value, form) if math.isfinite(value) else NOTHING


def differing_keys(runs: Sequence[RunRecord]) -> Table:
    """The keys of the recipes that are not the same in all runs, but for the folder, a column a run."""
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
    """What each run was computed with, as its newest attempt, or its recipe.json, says."""
    said = [_versions(run) for run in runs]
    names = list(dict.fromkeys(name for each in said for name in each))
    return Table(
        ["package", *(run.name for run in runs)],
        [[name, *(each.get(name, NOTHING) for each in said)] for name in names],
    )


def attempts_table(runs: Sequence[RunRecord], *, most: int) -> Table:
    """The newest attempts of each run."""
    rows, owners = [], []
    for index, run in enumerate(runs):
        for record in run.attempts[-most:]:
            command = record.get("command")
            said = " ".join(str(part) for part in command) if isinstance(command, list) else ""
            values = (record["number"], record.get("time"), record.get("host"), record.get("world"), said)
            rows.append([run.name, *map(text, values)])
            owners.append(index)
    return Table(["run", "attempt", "started", "host", "ranks", "command"], rows, owners)


def _versions(run: RunRecord) -> dict[str, str]:
    for record in reversed(run.attempts):
        versions = record.get("versions")
        if isinstance(versions, dict):
            return {text(str(name)): text(version) for name, version in versions.items()}
    return dict(run.versions)
