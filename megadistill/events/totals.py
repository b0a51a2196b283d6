"""Sums over a run that its events keep, so that a start reads no event and no step from before them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from megadistill.events.event_log import SAVED
from megadistill.events.reading import events_from_end, is_number, seconds_of


@dataclass(frozen=True)
class Totals:
    """Sums over a run, in seconds: of its steps up to one, and of everything else until now."""

    began: float
    """Time of the first event, in seconds since 1970."""
    useful: float = 0.0
    """Time of the steps that count, each once."""
    startup: float = 0.0
    saving: float = 0.0
    validating: float = 0.0
    repeated: float = 0.0
    paused: float = 0.0
    """See `Goodput`."""
    student_diverged: bool = False
    """Whether the student has diverged in one of the steps."""

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> "Totals | None":
        """Those that an event keeps; None where it has none, or no complete ones."""
        values = event.get("totals")
        if not isinstance(values, dict) or type(values.get("student_diverged")) is not bool:
            return None
        values = {"validating": 0.0, **values}  # a release without validations
        names = [field.name for field in fields(cls) if field.name != "student_diverged"]
        if not all(is_number(values.get(name)) and math.isfinite(values[name]) for name in names):
            return None
        numbers = {name: float(values[name]) for name in names}
        return cls(**numbers, student_diverged=values["student_diverged"])

    def to_json(self) -> dict[str, Any]:
        """The value of an event's `totals`."""
        return {name: round(value, 3) if type(value) is float else value for name, value in asdict(self).items()}


class StepTotals(NamedTuple):
    """The sums up to a step."""

    step: int
    totals: Totals


@dataclass(frozen=True)
class History:
    """The events of a run from its last totals on."""

    last: Totals | None
    """The last totals; None: no event has any, and `since` are all events."""
    since: list[dict[str, Any]]
    """The events after them."""
    base: StepTotals | None
    """The last totals of a step that the given one continues."""
    student_diverged: bool
    """Whether the student diverged after `base`, at a step that the given one continues."""
    ended: float
    """Time of the last event, in seconds since 1970; 0 where there is none."""

    def totals(self) -> Totals | None:
        """The sums over all events, with the `useful` and `student_diverged` of `base`; None: there are no events."""
        times = list(_times(self.since))
        if self.last is None and not times:
            return None
        before = self.last or Totals(began=min(times))
        useful = self.base.totals.useful if self.base else 0.0
        has_diverged = self.student_diverged or (self.base is not None and self.base.totals.student_diverged)
        events, resumes = self.since, [each for each in self.since if each["event"] == "resumed"]
        return replace(
            before,
            useful=useful,
            startup=before.startup + sum(seconds_of(each, "startup_seconds") for each in resumes),
            saving=before.saving + sum(seconds_of(each, "stall_seconds") for each in events if each["event"] in SAVED),
            validating=before.validating
            + sum(seconds_of(each, "seconds") for each in events if each["event"] == "validated"),
            repeated=before.repeated + sum(seconds_of(each, "lost_seconds") for each in resumes),
            paused=before.paused + paused_seconds(events),
            student_diverged=has_diverged,
        )


def read_history(folder: Path, step: int) -> History:
    """The events of a run folder that a start after `step` needs: read from the last one back to the last totals.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    last, last_attempt, ended, base, has_diverged = None, 0, 0.0, None, False
    since: list[dict[str, Any]] = []
    limit, attempt = step, -1
    for event in events_from_end(folder):
        is_late = event["attempt"] < attempt  # its attempt had been replaced: a frozen process may write days later
        totals = None if is_late else Totals.of(event)
        if last is None and totals is None:
            since.append(event)
        elif last is None:
            last, last_attempt, ended = totals, event["attempt"], max(_times([event]), default=0.0)
        if is_late:
            continue
        attempt = -1 if event["event"] == "attempt_started" else event["attempt"]
        if totals is not None and event["step"] <= limit:
            base = StepTotals(event["step"], totals)
            break
        if event["event"] == "resumed":  # the steps after it were taken again
            limit = min(limit, event["step"])
        elif event["event"] == "rollback":
            to_step = event.get("to_step")
            limit = min(limit, to_step if type(to_step) is int else 0)
        elif event["event"] == "student_diverged" and event["step"] <= limit:
            has_diverged = True
    since = list(_of_newest_attempts(reversed(since), last_attempt))
    return History(last, since, base, has_diverged, max(_times(since), default=ended))


def _of_newest_attempts(events: Iterable[dict[str, Any]], newest: int) -> Iterator[dict[str, Any]]:
    """The events but for those of an attempt after a later one has started: a frozen process may continue, and end,
    days after it was replaced. `newest`: the attempt of the event before them."""
    for event in events:
        if event["attempt"] >= newest:
            newest = event["attempt"]
            yield event


def _times(events: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    return (time for event in events if math.isfinite(time := float(event["time"])))


def paused_seconds(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds between the stops that were requested, or the ends of runs, and the starts after them."""
    total, since = 0.0, None
    for event in events:
        if event["event"] in ("stopped", "completed") or event.get("requested"):
            since = float(event["time"])
        elif event["event"] == "attempt_started" and since is not None:
            total += max(0.0, float(event["time"]) - since)
            since = None
    return total
