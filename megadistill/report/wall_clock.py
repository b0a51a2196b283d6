"""Wall clock of a run: the time of each step, the use of the wall time, and the state of the run."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadistill.events import SAVED, Goodput, paused_seconds
from megadistill.report.run_record import Floats, RunRecord
from megadistill.units import left

SILENT_SECONDS, SILENT_STEPS = 600.0, 20
"""Silence, in seconds and in median steps, after which a run without an end may have been killed."""

PACE_STEPS = 50
"""Number of the last steps whose pace gives the time that a run still takes."""


@dataclass(frozen=True)
class Clock:
    """The wall clock of a run."""

    began: float
    """Time of the first event, or of the first step's begin, in seconds since 1970."""
    ends: Floats
    """[steps] end of each step, in seconds since `began`; NaN where metrics.jsonl has no time."""
    start: NDArray[np.int64]
    """[steps] number of the start, counted from 0 over resumes and rollbacks, in which each step was taken."""
    wall: float
    """Seconds from `began` to the last event or step."""


def clock_of(run: RunRecord) -> Clock:
    """The wall clock of `run`."""
    times, seconds = run.series["time"], np.nan_to_num(run.series["seconds"])
    began = run.events[0].time if run.events else float(np.nan_to_num(times - seconds)[0]) if len(run) else 0.0
    resumes = [event.time for event in run.events if event.kind == "resumed"]
    start = np.maximum(np.searchsorted(resumes, times, side="right") - 1, 0)
    last = [event.time for event in run.events[-1:]] + times[np.isfinite(times)][-1:].tolist()
    return Clock(began=began, ends=times - began, start=start, wall=max(last, default=began) - began)


def goodput_of(run: RunRecord, clock: Clock) -> Goodput:
    """Goodput over all attempts, as `events.goodput` counts it; up to the last step of a run that is not finished."""
    if not run.events:
        return Goodput()
    resumes = [event for event in run.events if event.kind == "resumed"]
    paused = paused_seconds(
        {"event": event.kind, "time": event.time, "requested": event.values.get("requested")} for event in run.events
    )
    return Goodput(
        useful=float(np.nansum(run.series["seconds"])),
        startup=sum(event.seconds("startup_seconds") for event in resumes),
        saving=sum(event.seconds("stall_seconds") for event in run.events if event.kind in SAVED),
        validating=sum(event.seconds("seconds") for event in run.events if event.kind == "validated"),
        repeated=sum(event.seconds("lost_seconds") for event in resumes),
        wall=clock.wall - paused,
        paused=paused,
    )


def state_of(run: RunRecord, *, now: float) -> str:
    """The state of the run in a few words."""
    last_step = int(run.series["step"][-1]) if len(run) else 0
    planned = run.setting("train.steps")
    kinds = [event.kind for event in run.events if "checkpoint" not in event.kind or "quarantined" in event.kind]
    last = kinds[-1] if kinds else None
    if last == "completed" or (last is None and isinstance(planned, int) and last_step >= planned):
        return "completed"
    if last == "stopped":
        return "stopped"
    if last == "attempt_failed":
        return "ended by a fault"
    usual = float(np.nanmedian(run.series["seconds"])) if run.has("seconds") else 0.0
    if now - run.modified > max(SILENT_SECONDS, SILENT_STEPS * usual):
        return f"silent since {utc(run.modified)}"
    return f"running, {remaining}" if (remaining := _remaining(run, last_step, planned)) else "running"


def _remaining(run: RunRecord, last_step: int, planned: Any) -> str:
    """The time that the other steps take at the pace of the last ones since the run was resumed; "" if unknown."""
    times = run.series["time"]
    resumed = max((event.time for event in run.events if event.kind == "resumed"), default=-np.inf)
    recent = np.flatnonzero(np.isfinite(times) & (times > resumed))[-PACE_STEPS:]
    if len(recent) < 2 or not isinstance(planned, int) or last_step >= planned:
        return ""
    seconds, steps = (float(np.ptp(run.series[name][recent])) for name in ("time", "step"))
    return left((planned - last_step) * seconds / steps)


def utc(time: float) -> str:
    """A time as text, to the second."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
