"""What a run writes of itself, line by line, read back: events.jsonl, metrics.jsonl, and the goodput that follows.

It knows no room. An event is one line of JSON: `time` (seconds since 1970), `attempt`, `event` (a name of `EVENTS`),
`step`, and what belongs to the event. Costs are in seconds.
"""

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = {
    "start": "an attempt began: ranks, host",
    "resume": "it goes on after `step`; `seconds` since its start, `lost_steps` that an earlier attempt had done",
    "set_aside": "a checkpoint that cannot be used, and why",
    "saved": "a checkpoint is whole; `stall_seconds` the run waited, `write_seconds` the disk took, `bytes`",
    "save_failed": "a checkpoint was given up, and why; the run goes on",
    "skip": "a step moved nothing, since a loss or a gradient was not finite",
    "spike": "the loss left its window",
    "rollback": "back to the checkpoint of `to_step`; the sequences `skip` are left out",
    "teacher_alarm": "the teacher's cross-entropy left its window",
    "hole": "damaged sequences were masked: `slots`",
    "straggler": "a rank computes slower than the others",
    "signal": "the run was asked to stop, and by what",
    "stop": "it stopped after `step` with a checkpoint; the same command goes on",
    "fault": "an attempt ended by a fault; `exit_code`",
    "done": "the last step is taken and saved",
}


class JsonLines:
    """Appends to a file of JSON lines. Each line is on disk when `append` returns, or waits for the disk to have room.

    A full disk is no reason to end a run: what it refuses is kept, and written before the next line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def append(self, values: Mapping[str, Any]) -> str | None:
        """Why the disk refuses the line; None where it took it."""
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
    """One write, so that lines of several processes stay whole; what a full disk took of it is taken back.

    A last line that a dead machine left without its end gets one first, or this line would be lost with it.
    """
    size = os.fstat(descriptor).st_size
    if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    written = os.write(descriptor, line)
    if written < len(line):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class EventLog:
    """Writes events.jsonl. Only the rank that speaks for the run does, but for faults, which any rank may write."""

    def __init__(self, folder: Path, attempt: int, *, speaks: bool) -> None:
        self._lines = JsonLines(folder / "events.jsonl")
        self._attempt = attempt
        self._speaks = speaks

    def write(self, event: str, *, step: int, **values: Any) -> None:
        if self._speaks:
            self._append(event, step, values)

    def fault(self, reason: str, *, step: int, rank: int, exit_code: int) -> None:
        """The end of an attempt, as this rank, whichever it is, met it."""
        self._append("fault", step, {"rank": rank, "reason": reason, "exit_code": exit_code})

    def _append(self, event: str, step: int, values: dict[str, Any]) -> None:
        assert event in EVENTS, event
        self._lines.append(
            {"time": round(time.time(), 3), "attempt": self._attempt, "event": event, "step": step, **values}
        )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a .jsonl file; what a kill cut short is left out, and a missing file has none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            yield values


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went, in seconds; all its attempts, and the time between them."""

    useful: float = 0.0
    """Steps that count, each once."""
    starting: float = 0.0
    """From the start of an attempt to its first step: imports, models, checkpoints."""
    saving: float = 0.0
    """What steps waited for checkpoints."""
    wall: float = 0.0

    @property
    def lost(self) -> float:
        """The rest: steps that were taken again, hangs, the time between attempts."""
        return max(0.0, self.wall - self.useful - self.starting - self.saving)

    @property
    def ratio(self) -> float:
        """Useful step time over wall time."""
        return self.useful / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        shares = [(name, getattr(self, name)) for name in ("starting", "saving", "lost")]
        said = ", ".join(f"{name} {seconds / self.wall:.1%}" for name, seconds in shares) if self.wall > 0 else ""
        return f"goodput {self.ratio:.1%} of {self.wall:,.0f} s ({said})"


def goodput(folder: Path) -> Goodput:
    """Of the run in `folder`, from its first event to its last. A run that wrote no events has a wall time of 0."""
    events = list(read_lines(folder / "events.jsonl"))
    times = [float(event["time"]) for event in events]
    if not times:
        return Goodput()
    return Goodput(
        useful=sum(float(step.get("seconds") or 0.0) for step in read_lines(folder / "metrics.jsonl")),
        starting=sum(float(event["seconds"]) for event in events if event["event"] == "resume"),
        saving=sum(float(event["stall_seconds"]) for event in events if event["event"] == "saved"),
        wall=max(times) - min(times),
    )
