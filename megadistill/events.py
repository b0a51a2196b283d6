"""Records of a run as JSON lines (events.jsonl, metrics.jsonl), and the goodput that follows from them.

An event is one line: `time` (seconds since 1970), `attempt`, `event` (a name of `EVENTS`), `step`, and the event's own
keys. Costs are in seconds.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EVENTS = {
    "attempt_started": "an attempt began: `world_size`, `attempt_record` (host, command, versions)",
    "resumed": "training continues after `step` (0: from the start); `startup_seconds`, `lost_steps` to take again",
    "checkpoint_saved": "`stall_seconds` the run waited, `write_seconds` on the disk, `bytes` a rank, `removed`",
    "checkpoint_failed": "a checkpoint was not written: `reason`, `stall_seconds`; the run continues",
    "checkpoint_quarantined": "a checkpoint that cannot be used was renamed to `path`: `reason`",
    "step_skipped": "the optimizer did not move, since a loss or a gradient was not finite: `reason`",
    "loss_spike": "the `loss` left its window: `median`, `zscore`",
    "rollback": "back to the checkpoint of `to_step`; `skipped_slots` [first, stop) are left out from then on",
    "teacher_drift": "the `teacher_ce` left its window: `median`, `zscore`, `slots` [first, last] of the step",
    "samples_masked": "corrupt sequences were masked: `slots`",
    "straggler": "a rank is slower than the others: `message`",
    "stop_requested": "a stop of the run was requested: `reason`",
    "stopped": "the run stopped after `step` with a checkpoint: `reason`; the same command resumes it",
    "attempt_failed": "an attempt ended by a fault: `rank`, `reason`, `exit_code`",
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

    def attempt_failed(self, reason: str, *, step: int, rank: int, exit_code: int) -> None:
        """Records the end of an attempt by a fault, on any rank."""
        self._append("attempt_failed", step, {"rank": rank, "reason": reason, "exit_code": exit_code})

    def _append(self, event: str, step: int, values: dict[str, Any]) -> None:
        assert event in EVENTS, event
        self._lines.append(
            {"time": round(time.time(), 3), "attempt": self._attempt, "event": event, "step": step, **values}
        )


def json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object of each line of a .jsonl file, None for a damaged line. A missing file has none.

    Read line by line, as a run of a million steps writes half a gigabyte.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(MAX_LINE_BYTES):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if values is not None or line.strip():
                yield values if isinstance(values, dict) else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl file that are not damaged."""
    return (line for line in json_lines(path) if line is not None)


@dataclass(frozen=True)
class Goodput:
    """Wall time of a run in seconds by its use, over all attempts and the time between them."""

    useful: float = 0.0
    """Time of the steps that count, each once."""
    startup: float = 0.0
    """Time between the start of an attempt and its first step: imports, models, checkpoints."""
    saving: float = 0.0
    """Time that steps waited for checkpoints."""
    wall: float = 0.0

    @property
    def lost(self) -> float:
        """The rest: repeated steps, hangs, the time between attempts."""
        return max(0.0, self.wall - self.useful - self.startup - self.saving)

    @property
    def ratio(self) -> float:
        """Useful step time over wall time."""
        return self.useful / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        shares = [f"{name} {getattr(self, name) / (self.wall or 1.0):.1%}" for name in ("startup", "saving", "lost")]
        return f"goodput {self.ratio:.1%} of {self.wall:,.0f} s ({', '.join(shares)})"


def goodput(folder: Path) -> Goodput:
    """The goodput of a run folder, from its first event to its last. Without events the wall time is 0."""
    events = list(read_lines(folder / "events.jsonl"))
    times = [float(event["time"]) for event in events]
    if not times:
        return Goodput()
    return Goodput(
        useful=sum(float(step.get("seconds") or 0.0) for step in read_lines(folder / "metrics.jsonl")),
        startup=sum(float(event["startup_seconds"]) for event in events if event["event"] == "resumed"),
        saving=sum(float(event["stall_seconds"]) for event in events if event["event"] == "checkpoint_saved"),
        wall=max(times) - min(times),
    )
