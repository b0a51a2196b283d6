"""Numbered attempts at a run: a fencing token, so that only the newest start writes to the run folder.

A node that lost its network keeps its ranks running, and a frozen process can continue. `attempts/00002.json` is made
by an exclusive create; attempt 1 checks for it before each step, commit and deletion, and ends when it exists.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megadistill.errors import Superseded, UserError
from megadistill.io import read_json
from megadistill.redaction import command_line, names_a_secret, printable, without_secrets
from megadistill.train.checkpoint.versions import versions

RECORDED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HOSTNAME", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE",
)  # fmt: skip
RECORDED_PREFIXES = ("GLOO_", "NCCL_", "SLURM_", "TORCHELASTIC_", "TORCH_FR_", "TORCH_NCCL_")


@dataclass(frozen=True)
class Attempt:
    """One start of a run. `number` counts from 1."""

    folder: Path
    """The run folder."""
    number: int

    def is_newest(self) -> bool:
        """Whether no later attempt has acquired the folder. Costs one `stat`."""
        return not attempt_path(self.folder, self.number + 1).exists()

    def require_newest(self) -> None:
        """Raises Superseded: a later attempt has acquired the folder."""
        if self.is_newest():
            return
        later = attempt_record(attempt_path(self.folder, self.number + 1))
        where = f" {place_of(later)} at {printable(str(later.get('time')))}" if later else ""
        raise Superseded(
            f"attempt {self.number} of {self.folder} ends: attempt {self.number + 1} has started{where}, and only the "
            "newest may write to the folder. Give two runs two folders (run.folder)"
        )


@dataclass(frozen=True)
class Process:
    """A process of this system."""

    started: int
    """When it started, in clock ticks since the system's start: another process with its id has another time."""
    state: str
    """One letter, as in /proc/PID/stat."""


def newest_number(folder: Path) -> int:
    """The number of the newest attempt at the run of this folder; 0 where there is none."""
    names = (path.stem for path in (folder / "attempts").glob("*.json"))
    return max((int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 10), default=0)


def acquire(folder: Path, record: Mapping[str, Any], *, after: int | None = None) -> Attempt:
    """Acquires a run folder as its next attempt, making the folder where there is none. Called by one rank.

    `after`: the attempt that was the newest when the folder was found free; None: whichever is the newest now ends.

    Raises:
        UserError: another start has acquired the folder since `after`.
    """
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    number = 1 + (newest_number(folder) if after is None else after)
    while True:
        try:
            attempt_path(folder, number).touch(exist_ok=False)  # an exclusive create
        except FileExistsError:  # taken by a concurrent start
            if after is not None:
                other = attempt_record(attempt_path(folder, number))
                raise UserError(
                    f"{folder}: another start came first, {place_of(other)}, as attempt {number}. {ways_to_end(folder)}"
                ) from None
            number += 1
        else:
            break
    path = attempt_path(folder, number)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({**record, "folder": str(folder.resolve())}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk: an empty record would look like an attempt somewhere else
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return Attempt(folder, number)


def launch_record(world: int) -> dict[str, Any]:
    """How this attempt was started: time, host, command, versions, environment. Secrets are left out or masked."""
    environment = {
        name: without_secrets(value)
        for name, value in sorted(os.environ.items())
        if (name in RECORDED_VARIABLES or name.startswith(RECORDED_PREFIXES)) and not names_a_secret(name)
    }
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "system": this_system(),
        "process_started": None if (process := process_of(os.getpid())) is None else process.started,
        "world": world,
        "command": command_line([sys.executable, *sys.orig_argv[1:]]),
        "versions": versions(),
        "environment": environment,
    }


def this_system() -> str | None:
    """The name space of process ids: this boot of this machine, this container; None where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_of(pid: int) -> Process | None:
    """The process of this id; None where there is none, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # before it, the name of the process, which may hold anything
    return Process(started=int(fields[19]), state=fields[0])


def place_of(record: Mapping[str, Any]) -> str:
    """`on HOST (pid N)`, of the record of an attempt."""
    return f"on {printable(str(record.get('host')))} (pid {printable(str(record.get('pid')))})"


def ways_to_end(folder: Path) -> str:
    """The ways to end the attempt that has the run folder, for a message."""
    return (
        f"Stop it with `touch {folder / 'STOP'}`, wait for its end, or add --take-over, which ends it without a "
        "checkpoint"
    )


def attempt_path(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:05d}.json"


def attempt_record(path: Path) -> dict[str, Any]:
    """The record of an attempt; empty where it is not written yet, or cannot be read."""
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
