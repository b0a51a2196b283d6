"""`make drill`: every case, a table, exit 0 or 1."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.drill import replicas  # noqa: F401  its cases
from tests.drill.cases import CASES, CaseResult
from tests.drill.launch import left_over
from tests.drill.place import Place

QUICK = (
    "node-lost",
    "kill-in-save",
    "flipped",
    "usr2",
    "nan",
    "zombie",
    "second-start",
    "replica-across",
    "replica-first",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CASES), help="these cases")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave it")
    options = parser.parse_args()
    if options.list:
        for name, (fault, _) in CASES.items():
            print(f"{name:<16} {fault}")
        return 0
    folder = options.keep or Path(tempfile.mkdtemp(prefix="drill-"))
    began = time.monotonic()
    place = Place(folder).make()
    rows = [(CASES[name][0], *run(name, place)) for name in options.only or CASES]
    table = Table(title=f"the drill: {len(rows)} faults in {time.monotonic() - began:.0f} s", title_justify="left")
    for heading, justify in (
        ("fault", "left"),
        ("ended after", "right"),
        ("steps taken twice", "right"),
        ("result", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for fault, result, problem in rows:
        table.add_row(fault, *cells(result, problem))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if any(problem for _, _, problem in rows) else 0


def run(name: str, place: Place) -> tuple[CaseResult | None, str | None]:
    """The result of a case, or its problem."""
    began = time.monotonic()
    result, problem = None, None
    try:
        result = CASES[name][1](place)
    except AssertionError as error:
        problem = str(error)
    ranks = left_over()
    if ranks:
        problem = f"{problem or ''} processes were left over: {ranks}"
    print(f"{name}: {problem or (result and result.result)} ({time.monotonic() - began:.1f} s)", flush=True)
    return result, problem


def cells(result: CaseResult | None, problem: str | None) -> tuple[str, str, str]:
    if result is None or problem is not None:
        return "", "", f"FAILED: {(problem or '').splitlines()[0]}"
    seconds = "" if result.seconds is None else f"{result.seconds:.1f} s"
    return seconds, "" if result.steps is None else str(result.steps), result.result


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the fork server would be waited for
