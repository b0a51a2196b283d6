"""Room `report`: when the steps of a run were taken, where its wall time went, and how it stands. It reads no file."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from megadistill.events import Goodput
from megadistill.report.run_record import Event, Floats, RunRecord

SILENT_SECONDS, SILENT_STEPS = 600.0, 20
"""A run without an end that wrote nothing for this long, and for this many of its steps, may have been killed."""


@dataclass(frozen=True)
class Clock:
    """The wall clock of a run."""

    began: float
    """Seconds since 1970: the first event; 0 for a run that wrote no events."""
    ends: Floats
    """[steps] seconds since `began` at which each step ended."""
    start: NDArray[np.int64]
    """[steps] the start that each step was taken in, counted from 0 over resumes and rollbacks."""
    wall: float
    """Seconds from the first event to the last sign of the run."""


def clock_of(run: RunRecord) -> Clock:
    """The wall clock of `run`.

    metrics.jsonl has no times: a step ends at the time of its start (`resume`), plus the seconds of the start's steps
    up to it and of their waits for checkpoints. Steps that a later start took again are not in metrics.jsonl, so a step
    that stands was taken in the last start that begins before it.
    """
    steps, seconds = run.series["step"], np.nan_to_num(run.series["seconds"])
    resumes = [event for event in run.events if event.kind == "resumed"]
    saved = [event for event in run.events if event.kind == "checkpoint_saved"]
    began = run.events[0].time if run.events else 0.0
    ends, start = np.cumsum(seconds), np.zeros(len(steps), dtype=np.int64)
    for index, resume in enumerate(resumes):
        start[steps > resume.step] = index
    for index, resume in enumerate(resumes):
        own, until = start == index, resumes[index + 1].time if index + 1 < len(resumes) else np.inf
        waits = _waited(steps[own], [event for event in saved if resume.time <= event.time < until])
        ends[own] = resume.time - began + np.cumsum(seconds[own]) + waits
    last_event = run.events[-1].time - began if run.events else 0.0
    return Clock(began=began, ends=ends, start=start, wall=max([last_event, *ends[-1:]]))


def goodput_of(run: RunRecord, clock: Clock) -> Goodput:
    """Of all attempts, as `events.goodput` counts it; of a run that goes on, up to its last step."""
    if not run.events:
        return Goodput()
    return Goodput(
        useful=float(np.nansum(run.series["seconds"])),
        startup=sum(event.seconds("startup_seconds") for event in run.events if event.kind == "resumed"),
        saving=sum(event.seconds("stall_seconds") for event in run.events if event.kind == "checkpoint_saved"),
        wall=clock.wall,
    )


def state_of(run: RunRecord, *, now: float) -> str:
    """How the run stands, in a few words."""
    last_step = int(run.series["step"][-1]) if len(run) else 0
    planned = run.setting("train.steps")
    kinds = [event.kind for event in run.events if event.kind not in ("checkpoint_saved", "checkpoint_failed")]
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
    return "running"


def utc(time: float) -> str:
    """A time as people write it, to the second."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _waited(steps: Floats, saved: Sequence[Event]) -> Floats:
    """[steps] seconds that were spent on the checkpoints of earlier steps than each."""
    ordered = sorted(saved, key=lambda event: event.step)
    waits = np.cumsum([0.0, *(event.seconds("stall_seconds") for event in ordered)])
    return np.asarray(waits[np.searchsorted([event.step for event in ordered], steps, side="left")])
