"""The steps and events of a run that a start needs, read from the ends of metrics.jsonl and events.jsonl."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadistill.events import Totals, metrics_from_end, read_history, read_metrics, seconds_of
from megadistill.train.resilience.anomalies import DIVERGED_STEPS, DivergedStudentMonitor


@dataclass(frozen=True)
class RunHistory:
    """The past of a run that continues after a step."""

    losses: list[float]
    """The last ones up to the step, oldest first; NaN where a line has none."""
    teacher_ces: list[float]
    entry: int
    """The curriculum entry of the last step, of which losses and cross-entropies are."""
    student: DivergedStudentMonitor
    """Knows all steps up to the step."""
    lost_steps: int
    """Logged steps after the step, to take again."""
    lost_seconds: float
    totals: Totals | None
    """Sums over the events, and over the steps up to the step; None: there are no events."""


def read_run_history(folder: Path, step: int, *, window: int, vocab_size: int) -> RunHistory:
    """The past of a run that a start after `step` needs; `window`: the number of losses.

    Reads the lines back to the last `Totals` that the start continues, which is a checkpoint's, so a few steps more
    than the window; all of them where an earlier release wrote the run.

    Raises:
        UserError: a folder, a pipe or a device has one of the files' names.
    """
    history = read_history(folder, step)
    base, first_steps = history.base, window // 2
    lines: deque[dict[str, Any]] = deque()
    useful, lost_steps, lost_seconds = 0.0, 0, 0.0
    least = max(window, DIVERGED_STEPS)
    for _, line in metrics_from_end(folder):
        number = int(line["step"])
        if number > step:
            lost_steps = max(lost_steps, number - step)
            lost_seconds += seconds_of(line, "seconds")
            continue
        is_new = base is None or number > base.step
        if not is_new and len(lines) >= least:
            break
        useful += seconds_of(line, "seconds") if is_new else 0.0
        if len(lines) < least:
            lines.appendleft(line)
    totals = history.totals()
    if base is None or totals is None:
        student = DivergedStudentMonitor(vocab_size, first_steps=first_steps)
        for _, line in read_metrics(folder):
            if line["step"] <= step:
                student.update(int(line["step"]), _number(line, "student_ce"))
    else:
        first_ce = _first_ce(folder, step)
        reported = totals.student_diverged
        student = DivergedStudentMonitor(vocab_size, first_steps=first_steps, first_ce=first_ce, reported=reported)
        for line in lines:
            student.update(int(line["step"]), _number(line, "student_ce"))
    entry = _entry(lines[-1]) if lines else 1
    recent = [line for line in lines if _entry(line) == entry][-window:]
    return RunHistory(
        losses=[_number(line, "loss") for line in recent],
        teacher_ces=[_number(line, "teacher_ce") for line in recent],
        entry=entry,
        student=student,
        lost_steps=lost_steps,
        lost_seconds=lost_seconds,
        totals=None if totals is None else replace(totals, useful=totals.useful + useful),
    )


def _first_ce(folder: Path, step: int) -> float | None:
    """The student's cross-entropy (nats) at its first finite step."""
    for _, line in read_metrics(folder):
        if line["step"] > step:
            return None
        if math.isfinite(student_ce := _number(line, "student_ce")):
            return student_ce
    return None


def _entry(line: Mapping[str, Any]) -> int:
    entry = line.get("entry")
    return entry if isinstance(entry, int) else 1


def _number(line: Mapping[str, Any], name: str) -> float:
    value = line.get(name)
    return math.nan if value is None else float(value)
