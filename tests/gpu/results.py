"""What the checks measured: rows that a check writes as it goes, and the record of a whole run (JSON)."""

import json
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.checks import Check

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
"""How a check ended. Failed: a bar that is not met, an error, a signal, or its time limit."""


@dataclass(frozen=True)
class Row:
    """One figure of one case of a check. `value` is None where it was not measured; `note` then says why."""

    case: str
    figure: str
    value: float | None
    unit: str = ""
    note: str = ""


@dataclass
class Outcome:
    """A check's end and its figures."""

    name: str
    state: str
    reason: str = ""
    """Why it failed or was not run; empty where it passed."""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


@dataclass
class Results:
    """A run of `make gpu`."""

    stand_in: bool
    device: dict[str, str]
    """Facts about the device and the versions, name -> value."""
    commit: str
    date: str
    outcomes: list[Outcome] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Replaces the file at once: a killed run leaves the last complete one."""
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)

    @classmethod
    def load(cls, path: Path) -> "Results":
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        outcomes = [Outcome(**{**each, "rows": [Row(**row) for row in each["rows"]]}) for each in values["outcomes"]]
        return cls(**{**values, "outcomes": outcomes})


class Record:
    """Writes a check's rows to a file, a line each, so that a killed process keeps what it had measured."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.failures: list[str] = []
        """Of parts, a line each."""

    def __call__(self, case: str, figure: str, value: float, unit: str = "") -> None:
        self._write(Row(case, figure, float(value), unit))

    def left_out(self, case: str, reason: str) -> None:
        """A case that was not measured here, and why."""
        self._write(Row(case, "not measured", None, note=reason))

    @contextmanager
    def part(self, case: str) -> Iterator[None]:
        """An exception in this context fails the check, whose other parts are measured all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{case}: {reason_of(error)}")
            self.left_out(case, f"failed: {reason_of(error)}")

    def _write(self, row: Row) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"    {row.case}: {row.figure} {shown(row)}", flush=True)


def reason_of(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"


def shown(row: Row) -> str:
    """A value with its unit, or why there is none."""
    if row.value is None:
        return row.note
    digits = f"{row.value:,.0f}" if row.value == int(row.value) and abs(row.value) < 1e15 else f"{row.value:.4g}"
    return f"{digits} {row.unit}".strip()


def rows_of(path: Path) -> list[Row]:
    """The rows of a file, without a last line that was cut off."""
    return list(_complete_rows(path)) if path.exists() else []


def _complete_rows(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            return
        yield Row(**values)


def missed(check: Check, rows: list[Row], *, stand_in: bool) -> list[str]:
    """The bars that the figures do not meet, a line each. A stand-in does not have to meet those of a GPU."""
    lines = []
    for row in rows:
        bar = check.bar(row.case, row.figure)
        if bar is None or row.value is None or (stand_in and bar.of_a_gpu):
            continue
        if not bar.is_met(row.value):
            lines.append(f"{row.case}: {row.figure} is {shown(row)}, the bar is {bar}")
    return lines
