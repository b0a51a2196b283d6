"""Room `train`: attempts at a run. Each start has a number, and only the newest may touch the run folder.

A node that was cut off keeps its ranks running, and a frozen process can thaw: `attempts/00002.json` comes to be by an
exclusive create, and the attempt before it finds the file when it next wants to commit, to delete, or to take a step.
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

from megadistill.errors import OperatorFault
from megadistill.redaction import command_line, names_a_secret, without_secrets
from megadistill.versions import versions

MAX_RECORD_BYTES = 1 << 20

RECORDED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HOSTNAME", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE",
)  # fmt: skip
RECORDED_PREFIXES = ("GLOO_", "NCCL_", "SLURM_", "TORCHELASTIC_", "TORCH_NCCL_")


@dataclass(frozen=True)
class Attempt:
    """One start of a run. `number` counts from 1."""

    folder: Path
    """The run folder."""
    number: int

    def is_newest(self) -> bool:
        """Whether no later start has taken the folder over: one look at one name."""
        return not _path(self.folder, self.number + 1).exists()

    def require_newest(self) -> None:
        """Raises OperatorFault: another attempt has the folder now."""
        if self.is_newest():
            return
        later = _record(_path(self.folder, self.number + 1))
        where = f" on {later.get('host')} at {later.get('time')}" if later else ""
        raise OperatorFault(
            f"attempt {self.number} of {self.folder} is over: attempt {self.number + 1} has started{where}. This one "
            "leaves the folder as it is; two runs need two folders (run.folder)"
        )


def claim(folder: Path, record: Mapping[str, Any]) -> Attempt:
    """The next attempt of a run folder, from now on the newest. Called by one rank; it makes the folder."""
    attempts = folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.stem) for path in attempts.glob("*.json") if path.stem.isdigit()), default=0)
    content = (json.dumps(dict(record), indent=1) + "\n").encode()
    while True:
        try:
            descriptor = os.open(_path(folder, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:  # another start was quicker
            number += 1
            continue
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        return Attempt(folder, number)


def launch_record(world: int) -> dict[str, Any]:
    """How this attempt was started: where, when, by which command, with which versions. No value looks like a key."""
    environment = {
        name: without_secrets(value)
        for name, value in sorted(os.environ.items())
        if (name in RECORDED_VARIABLES or name.startswith(RECORDED_PREFIXES)) and not names_a_secret(name)
    }
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world": world,
        "command": command_line([sys.executable, *sys.orig_argv[1:]]),
        "versions": versions(),
        "environment": environment,
    }


def _path(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:05d}.json"


def _record(path: Path) -> dict[str, Any]:
    """What the attempt says of itself; nothing where it has not said it yet."""
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
