"""Records of a run as JSON lines (events.jsonl, metrics.jsonl), and the goodput that follows from them.

An event is one line: `time` (seconds since 1970), `attempt`, `event` (a name of `EVENTS`), `step`, and the event's own
keys. Costs are in seconds.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.errors import UserError
from megadistill.io import NotRegularError, open_regular
from megadistill.redaction import redacted
from megadistill.units import number_of, spell

logger = logging.getLogger(__name__)

EVENTS = {
    "attempt_started": "an attempt began: `world_size`, `attempt_record` (host, command, versions), `before`: ranks "
    "of the attempt before that were aborted",
    "resumed": "training continues after `step` (0: from the start); `startup_seconds`, `lost_steps` to take again and "
    "their `lost_seconds`",
    "branched": "the run began from `step` of another one: `run` (its folder's name), `sha256` of the manifest",
    "recipe_changed": "the run continues after `step` with another recipe: `changes`, key -> [former, present value]",
    "checkpoint_saved": "`stall_seconds` the host waited (an accelerator's copy aside), `write_seconds` on the disk, "
    "`bytes` a rank, `removed`",
    "checkpoint_failed": "a checkpoint was not written: `reason`, `stall_seconds`; the run continues",
    "checkpoint_quarantined": "a checkpoint that cannot be used was renamed to `path`: `reason`",
    "step_skipped": "the optimizer did not move, since a loss or a gradient was not finite: `reason`",
    "loss_spike": "the `loss` left its window: `median`, `zscore`",
    "student_diverged": "`student_ce` stayed above `limit`, far above `first_ce` of the first step",
    "experts_starved": "`count` experts of the student had a small part of an even load over `steps` steps: `experts`, "
    "each with `layer`, `expert` and its relative `load`",
    "rollback": "back to the checkpoint of `to_step`; `skipped_slots` [first, stop) are left out from then on",
    "teacher_drift": "the `teacher_ce` left its window: `median`, `zscore`, `slots` [first, last] of the step",
    "teacher_above_uniform": "the teacher's cross-entropy on the first tokens, `teacher_ce`, is above `uniform_ce`",
    "float8_teacher": "the teacher in float8 was compared with the native one on the first tokens: `kl` (nats a token)"
    ", `native_ce`, `float8_ce`",
    "samples_masked": "corrupt sequences were masked: `slots`",
    "straggler": "a rank is slower than the others: `message`",
    "stop_requested": "a stop of the run was requested: `reason`",
    "stopped": "the run stopped after `step` with a checkpoint: `reason`; the same command resumes it",
    "attempt_failed": "an attempt ended by a fault: `rank`, `reason`, `exit_code`; `requested` by a second signal",
    "completed": "the last step is taken and saved",
}

RENAMED_EVENTS = {
    "start": "attempt_started",
    "resume": "resumed",
    "saved": "checkpoint_saved",
    "save_failed": "checkpoint_failed",
    "set_aside": "checkpoint_quarantined",
    "skip": "step_skipped",
    "spike": "loss_spike",
    "teacher_alarm": "teacher_drift",
    "hole": "samples_masked",
    "signal": "stop_requested",
    "stop": "stopped",
    "fault": "attempt_failed",
    "done": "completed",
}
"""Names of events before 0.1.0, and today's."""

MAX_LINE_BYTES = 1 << 20
LARGEST_COUNT = 1 << 62
"""Steps, attempts and other integers of a line: larger ones are damage."""


class JsonLines:
    """Appends to a file of JSON lines, each with one write. Lines that a full disk refuses are written later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def append(self, values: Mapping[str, Any]) -> str | None:
        """Writes a line. Returns the disk's error, or None."""
        self._waiting.append((json.dumps(values) + "\n").encode())
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            return str(error)
        try:
            while self._waiting:
                _append_whole(descriptor, self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            return str(error)
        finally:
            os.close(descriptor)
        return None


def _append_whole(descriptor: int, line: bytes) -> None:
    """Writes a line at once, so that lines of several processes do not mix; a partial write is undone.

    A last line that a crash left without its newline gets one first, or this line would be lost with it.
    """
    size = os.fstat(descriptor).st_size
    if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    written = os.write(descriptor, line)
    if written < len(line):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class EventLog:
    """Writes events.jsonl. Only the rank with `writes` does, except for failures, which any rank may record."""

    def __init__(self, folder: Path, attempt: int, *, writes: bool) -> None:
        self._lines = JsonLines(folder / "events.jsonl")
        self._attempt = attempt
        self._writes = writes

    def write(self, event: str, *, step: int, **values: Any) -> None:
        if self._writes:
            self._append(event, step, values)

    def warn(self, event: str, line: str, /, *, step: int, **values: Any) -> None:
        """Writes an event and logs a line as a warning, both on the rank that writes."""
        if self._writes:
            logger.warning("%s", line)
            self._append(event, step, values)

    def attempt_failed(self, reason: str, *, step: int, rank: int, exit_code: int, requested: bool = False) -> None:
        """Records the end of an attempt by a fault, on any rank; `requested`: by a person, without a checkpoint."""
        values = {"rank": rank, "reason": reason, "exit_code": exit_code}
        self._append("attempt_failed", step, {**values, "requested": True} if requested else values)

    def _append(self, event: str, step: int, values: dict[str, Any]) -> None:
        assert event in EVENTS, event
        self._lines.append(
            {"time": round(time.time(), 3), "attempt": self._attempt, "event": event, "step": step, **redacted(values)}
        )


def scan_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Number (from 1), bytes and object of each line of a .jsonl file that is not blank; None for a damaged line.

    A missing file has none. Read line by line, as a run of a million steps writes half a gigabyte; of a line above
    `MAX_LINE_BYTES` the rest is passed over. The last line is left out where a kill has cut off its end.

    Raises:
        UserError: a folder, a pipe or a device has its name.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, NotRegularError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): move it away") from None
    number = 0
    with file:
        while part := file.readline(MAX_LINE_BYTES):
            number += 1
            line, is_too_long = part, False
            while not part.endswith(b"\n") and (part := file.readline(MAX_LINE_BYTES)):
                is_too_long = True
            values = None if is_too_long else _object_of(line)
            if values is None and not part:
                return
            if is_too_long or line.strip():
                yield number, line, values


def _object_of(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object of each line of a .jsonl file, None for a damaged line, see `scan_lines`."""
    return (values for _, _, values in scan_lines(path))


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run folder's events.jsonl that have the keys of an event; a warning counts the others.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    return (values for _, values in _valid_lines(folder / "events.jsonl", is_event))


def read_metrics(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a run folder's metrics.jsonl that have the numbers of a step, and these; a warning counts the
    others.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    return _valid_lines(folder / "metrics.jsonl", _is_step)


def last_step(folder: Path) -> int | None:
    """The last step in metrics.jsonl, of which only the end is read; None where there is none."""
    try:
        with open_regular(folder / "metrics.jsonl") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LINE_BYTES))
            content = file.read(MAX_LINE_BYTES)
    except (FileNotFoundError, IsADirectoryError, NotRegularError):
        return None
    for line in reversed(content.splitlines()):
        values = _object_of(line)
        if values is not None and _is_step(values):
            return int(values["step"])
    return None


def _valid_lines(path: Path, is_valid: Callable[[Mapping[str, Any]], bool]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    others: list[int] = []
    for number, line, values in scan_lines(path):
        if values is not None and is_valid(values):
            yield line, values
        elif others:
            others[1] += 1
        else:
            others = [number, 1]
    if others and (path, others[1]) not in _WARNED:
        _WARNED.add((path, others[1]))
        logger.warning(
            "%s: %s that this program has not written, left out; the first is line %s",
            path,
            number_of(others[1], "line"),
            f"{others[0]:,}",
        )


_WARNED: set[tuple[Path, int]] = set()
"""Files whose other lines were counted in a warning, with their number: a file is read more than once."""


def is_event(values: Mapping[str, Any]) -> bool:
    """Whether a line has the keys that every event has, of their types."""
    return (
        isinstance(values.get("event"), str)
        and _is_number(values.get("time"))
        and _is_count(values.get("attempt"))
        and _is_count(values.get("step"))
    )


def _is_step(values: Mapping[str, Any]) -> bool:
    numbers = (values[name] for name in ("loss", "student_ce", "teacher_ce", "seconds") if name in values)
    return _is_count(values.get("step")) and all(number is None or _is_number(number) for number in numbers)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_COUNT)


def _seconds(values: Mapping[str, Any], name: str) -> float:
    """A cost of an event or a step; 0 where it has none."""
    value = values.get(name)
    seconds = float(value) if value is not None and _is_number(value) else 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


@dataclass(frozen=True)
class Goodput:
    """Time of a run in seconds by its use, over all attempts and the time between them."""

    useful: float = 0.0
    """Time of the steps that count, each once."""
    startup: float = 0.0
    """Time between the start of an attempt and its first step: imports, models, checkpoints."""
    saving: float = 0.0
    """Time that steps waited for checkpoints."""
    repeated: float = 0.0
    """Time of steps that were taken again, since no checkpoint held them."""
    wall: float = 0.0
    """Wall time without `paused`."""
    paused: float = 0.0
    """Time between a stop that was requested, or the last step, and the next start. Neither useful nor lost."""

    @property
    def lost(self) -> float:
        """The rest: hangs, the time from a fault to the next start, and what is between two steps."""
        return max(0.0, self.wall - self.useful - self.startup - self.saving - self.repeated)

    @property
    def ratio(self) -> float:
        """Useful step time over wall time."""
        return self.useful / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        parts = ("startup", "saving", "repeated", "lost")
        shares = ", ".join(f"{name} {getattr(self, name) / (self.wall or 1.0):.1%}" for name in parts)
        paused = f"; paused for {spell(self.paused)}, not counted" if self.paused > 0 else ""
        return f"goodput {self.ratio:.1%} of {spell(self.wall)} ({shares}{paused})"


def _of_newest_attempts(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The events but for those of an attempt after a later one has started: a frozen process may continue, and end,
    days after it was replaced."""
    newest = 0
    for event in events:
        if event["attempt"] >= newest:
            newest = event["attempt"]
            yield event


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


def goodput(folder: Path) -> Goodput:
    """The goodput of a run folder, from its first event to its last. Without events the wall time is 0."""
    events = list(_of_newest_attempts(read_events(folder)))
    times = [time for event in events if math.isfinite(time := float(event["time"]))]
    if not times:
        return Goodput()
    resumes = [event for event in events if event["event"] == "resumed"]
    paused = paused_seconds(events)
    return Goodput(
        useful=sum(_seconds(step, "seconds") for _, step in read_metrics(folder)),
        startup=sum(_seconds(event, "startup_seconds") for event in resumes),
        saving=sum(_seconds(event, "stall_seconds") for event in events if event["event"] == "checkpoint_saved"),
        repeated=sum(_seconds(event, "lost_seconds") for event in resumes),
        wall=max(times) - min(times) - paused,
        paused=paused,
    )
