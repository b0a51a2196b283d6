"""Runs the checks one after another, each in a process of its own with a time limit, and writes after each of them.

A check that fails, dies, hangs or runs out of time stops none of the others.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu import page
from tests.gpu.checks import Check
from tests.gpu.results import FAILED, NOT_RUN, PASSED, Outcome, Results, missed, rows_of

KILL_SECONDS = 10.0
"""How long a killed process may take to end: one that hangs in the driver does not hold up the rest."""

STAND_IN_FACTOR = 4.0
"""Time limits of the stand-in, as a multiple: a CPU that is shared is slow, and no machine is paid by the second."""

SHOWN_LINES = 25
"""Of what a failed check printed last: its log may be gone with the machine."""

NO_ANSWER = 97
"""Exit code of a check that cannot be measured on this device; its last line says why."""


@dataclass(frozen=True)
class Place:
    """Where a run writes."""

    page: Path
    json: Path
    log: Path
    scratch: Path

    @classmethod
    def of(cls, out: Path | None, root: Path, scratch: Path, *, stand_in: bool) -> "Place":
        """`out`, or the repository's own page; a stand-in never writes there."""
        if out is None and stand_in:
            out = scratch / "out"
        if out is None:
            return cls(root / "docs/results/gpu.md", root / "benchmarks/results/gpu.json", scratch / "gpu.log", scratch)
        out.mkdir(parents=True, exist_ok=True)
        return cls(out / "gpu.md", out / "gpu.json", out / "gpu.log", scratch)

    def write(self, results: Results) -> None:
        results.save(self.json)
        self.page.write_text(page.page(results), encoding="utf-8")


@dataclass(frozen=True)
class Runner:
    results: Results
    place: Place
    environment: dict[str, str]
    """Of the checks' processes."""
    root: Path
    deadline: float
    """On `time.monotonic`: checks that begin after it are not run, and a running one is killed at it."""

    def run_all(self, checks: Sequence[Check]) -> bool:
        """Whether each check passed, or says why it was not run."""
        for check in checks:
            print(f"{check.name}: {check.question}", flush=True)
            outcome = self.run(check)
            self.results.outcomes.append(outcome)
            self.place.write(self.results)
            print(_line(outcome), flush=True)
        return all(outcome.state != FAILED for outcome in self.results.outcomes)

    def run(self, check: Check) -> Outcome:
        factor = STAND_IN_FACTOR if self.results.stand_in else 1.0
        limit = min(factor * check.seconds, self.deadline - time.monotonic())
        if limit < 1:
            return Outcome(check.name, NOT_RUN, "the run's time was over")
        rows_file = self.place.scratch / f"{check.name}.rows"
        start = time.monotonic()
        code, output = self._finish(self.command(check, rows_file), limit, check.name)
        taken, rows = time.monotonic() - start, rows_of(rows_file)
        state, reason = _judged(code, output, limit)
        if state == FAILED:
            print("\n".join(f"| {line[:300]}" for line in output.splitlines()[-SHOWN_LINES:]), flush=True)
        if state == PASSED and (lines := missed(check, rows, stand_in=self.results.stand_in)):
            state, reason = FAILED, "; ".join(lines)
        elif state == PASSED and not rows:
            state, reason = FAILED, "it measured nothing"
        return Outcome(check.name, state, reason, taken, rows)

    def command(self, check: Check, rows: Path) -> list[str]:
        """The process of a check, which writes its figures to `rows`."""
        command = [sys.executable, "-m", "tests.gpu", "--check", check.name, "--rows", str(rows)]
        return command + ["--stand-in"] * self.results.stand_in

    def _finish(self, command: list[str], limit: float, name: str) -> tuple[int | None, str]:
        """Exit code (None at the time limit), and what it printed. Its children end with it."""
        with open(self.place.log, "ab") as log:
            log.write(f"\n===== {name}\n".encode())
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
            code: int | None
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill_group(process)
        with open(self.place.log, "rb") as log:
            log.seek(start)
            return code, log.read().decode(errors="replace")


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(timeout=KILL_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"  process {process.pid} does not end: it is left behind", flush=True)


def _judged(code: int | None, output: str, limit: float) -> tuple[str, str]:
    """State and reason of an exit code."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it printed nothing"
    if code is None:
        return FAILED, f"killed at its limit of {limit:.0f} s; last line: {last}"
    if code == 0:
        return PASSED, ""
    if code == NO_ANSWER:
        return NOT_RUN, last
    if code < 0:
        return FAILED, f"died of {signal.Signals(-code).name}; last line: {last}"
    return FAILED, f"exit code {code}: {last}"


def _line(outcome: Outcome) -> str:
    reason = f": {outcome.reason}" if outcome.reason else ""
    return f"  {outcome.state} in {outcome.seconds:.0f} s, {len(outcome.rows)} figures{reason}"
