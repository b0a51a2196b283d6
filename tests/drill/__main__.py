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

from tests.drill.cases import CASES, Found
from tests.drill.launch import left_over
from tests.drill.place import Place

QUICK = ("kill-rank", "kill-in-save", "flipped", "usr2", "nan", "zombie")


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
        ("found after", "right"),
        ("steps taken twice", "right"),
        ("result", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for fault, found, problem in rows:
        table.add_row(fault, *cells(found, problem))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if any(problem for _, _, problem in rows) else 0


def run(name: str, place: Place) -> tuple[Found | None, str | None]:
    """What a case found, or what is wrong."""
    began = time.monotonic()
    found, problem = None, None
    try:
        found = CASES[name][1](place)
    except AssertionError as error:
        problem = str(error)
    orphans = left_over()
    if orphans:
        problem = f"{problem or ''} processes were left over: {orphans}"
    print(f"{name}: {problem or (found and found.result)} ({time.monotonic() - began:.1f} s)", flush=True)
    return found, problem


def cells(found: Found | None, problem: str | None) -> tuple[str, str, str]:
    if found is None or problem is not None:
        return "", "", f"FAILED: {(problem or '').splitlines()[0]}"
    seconds = "" if found.seconds is None else f"{found.seconds:.1f} s"
    return seconds, "" if found.steps is None else str(found.steps), found.result


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the fork server would be waited for
