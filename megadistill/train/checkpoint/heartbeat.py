"""Whether the newest attempt at a run is alive: a second start is refused then, since it would end the first one.

On the attempt's own host its process is looked up. Elsewhere, and in a copy of the folder, its heartbeat decides: the
first rank touches the record `attempts/00002.json` every `HEARTBEAT_SECONDS`, and a start watches for `WATCH_SECONDS`
whether the file's time moves.
So no clocks of two hosts are compared, and a host that is gone delays a start by seconds. Does not import torch.
"""

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megadistill.errors import UserError
from megadistill.events import events_from_end, last_step
from megadistill.io import open_regular
from megadistill.train.checkpoint.attempt import (
    attempt_path,
    attempt_record,
    newest_number,
    place_of,
    process_of,
    this_system,
    ways_to_end,
)

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
WATCH_SECONDS, POLL_SECONDS = 10.0, 0.25
"""Time without a heartbeat after which an attempt on another host counts as gone."""
GONE_SECONDS = 3600.0
"""Age of a heartbeat from which a start does not watch for another. `doctor` fails clocks that differ by as much."""

STOPPED_STATES = "TZX"
"""States of a process in /proc that takes no steps: stopped by a signal, or ended."""
ENDS = ("stopped", "completed", "attempt_failed")
"""Events after which an attempt takes no steps."""


class HeartbeatThread:
    """Touches an attempt's record until `close`. A thread of its own: a disk that hangs holds up nothing else."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = attempt_path(folder, number)
        self._closed = threading.Event()
        threading.Thread(target=self._renew, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _renew(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._path)  # no time is given: a file server takes its own


def refuse_running(folder: Path) -> int:
    """The number of the newest attempt, 0 for none, where none is alive. Waits if only a heartbeat can tell.

    Raises:
        UserError: it is alive.
    """
    number = newest_number(folder)
    if number == 0 or _has_ended(folder, number):
        return number
    path = attempt_path(folder, number)
    record = attempt_record(path)
    age = _heartbeat_age(path, record, f"attempt {number} of {folder}")
    if age is None:
        return number
    step = last_step(folder)
    at = f"at step {step}" if step is not None else "before its first step"
    raise UserError(
        f"{folder}: attempt {number} is running {place_of(record)}, {at}, heartbeat {age:.0f} s ago. "
        f"{ways_to_end(folder)}"
    )


def _has_ended(folder: Path, number: int) -> bool:
    for event in events_from_end(folder):
        if event["attempt"] == number and event["event"] in ENDS:
            return True
        if event["event"] == "attempt_started" and event["attempt"] <= number:
            return False
    return False


def _heartbeat_age(path: Path, record: dict[str, Any], name: str) -> float | None:
    """Seconds since the last heartbeat of an attempt that is alive; None for one that is not."""
    system, pid = record.get("system"), record.get("pid")
    if system is not None and system == this_system() and isinstance(pid, int):
        process = process_of(pid)
        if process is None or process.started != record.get("process_started") or process.state in STOPPED_STATES:
            return None
        if record.get("folder") in (
            None,
            str(path.parent.parent.resolve()),
        ):  # else a copy, or another path
            return max(0.0, time.time() - _modified(path))
    before = _modified(path)
    if abs(time.time() - before) > GONE_SECONDS:
        return None
    logger.info("%s may be alive %s: watching its heartbeat for %.0f s", name, place_of(record), WATCH_SECONDS)
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        if _modified(path) != before:
            return 0.0
    return None


def _modified(path: Path) -> float:
    """Modification time of a file, in seconds since 1970. Opens it: a network file system then asks its server."""
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_mtime
