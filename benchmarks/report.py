"""Options, tables and CSV file of a benchmark."""

import argparse
import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Spread

ROOT = Path(__file__).resolve().parent.parent

COLUMNS = (
    *("date", "commit", "cpu", "cores", "threads", "python", "torch", "question", "shape", "contender"),
    *("median", "low", "high", "unit", "ratio", "ratio_low", "ratio_high", "ratio_to", "repeats"),
)


@dataclass
class Report:
    """The tables on the screen, and the rows of the CSV file."""

    threads: int
    repeats: int
    measured: tuple[str, ...]
    """Paths that the commit in a row is about: a + marks uncommitted changes in them."""
    cpu_time: bool = False
    """Whether times are CPU seconds of the process, which other work on the machine moves less."""
    console: Console = field(default_factory=lambda: Console(width=120))
    rows: list[dict[str, object]] = field(default_factory=list)

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu_time else time.perf_counter

    @property
    def unit(self) -> str:
        return "cpu s" if self.cpu_time else "s"

    def add(
        self,
        question: str,
        shape: object,
        contender: str,
        value: Spread | float,
        unit: str = "s",
        *,
        ratio: Spread | None = None,
        to: str = "",
    ) -> None:
        spread = value if isinstance(value, Spread) else Spread(value, value, value)
        row: dict[str, object] = {"question": question, "shape": str(shape), "contender": contender, "unit": unit}
        row |= {name: f"{getattr(spread, name):.6g}" for name in ("median", "low", "high")}
        if ratio is not None:
            row |= {"ratio": f"{ratio.median:.4f}", "ratio_low": f"{ratio.low:.4f}", "ratio_high": f"{ratio.high:.4f}"}
        self.rows.append(row | {"ratio_to": to, "repeats": self.repeats if isinstance(value, Spread) else 1})

    def print_machine(self) -> None:
        """Prints the machine, the versions and the commit."""
        self.console.print(
            f"{cpu()}, {len(os.sched_getaffinity(0))} cores, {self.threads} threads a process, python "
            f"{platform.python_version()}, torch {torch.__version__}, commit {commit(self.measured)}",
            highlight=False,
        )

    def table(self, title: str, *columns: str) -> Table:
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        return table

    def append_to(self, file: Path) -> None:
        """Appends the rows to a CSV file."""
        about = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit(self.measured),
            "cpu": cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": self.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = not file.exists()
        with file.open("a", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows(about | row for row in self.rows)


def parser(subject: str, description: str | None, epilog: str, questions: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `description`: the docstring of the benchmark's module."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{subject}",
        description=description.split("\n\n")[0] if description else None,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--only", nargs="+", choices=questions, default=questions, help="these questions alone")
    options.add_argument("--repeats", type=int, default=7, help="rounds of each comparison (default %(default)s)")
    csv_file = ROOT / f"benchmarks/results/{subject}.csv"
    options.add_argument("--csv", type=Path, default=csv_file, help="where rows are added")
    options.add_argument("--no-csv", action="store_true", help="only print")
    return options


def commit(measured: Sequence[str]) -> str:
    """Short, with a + where the measured code differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    status = subprocess.run([*git, "status", "--short", "--", *measured], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def cell(spread: Spread) -> str:
    """A spread as a cell of a table."""
    return f"{spread.median:.3f}  ({spread.low:.2f} to {spread.high:.2f})"
