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

from megadistill.errors import OperatorFault
from megadistill.io import read_json
from megadistill.redaction import command_line, names_a_secret, without_secrets
from megadistill.versions import versions

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
        """Whether no later attempt has acquired the folder. Costs one `stat`."""
        return not _path(self.folder, self.number + 1).exists()

    def require_newest(self) -> None:
        """Raises OperatorFault: a later attempt has acquired the folder."""
        if self.is_newest():
            return
        later = attempt_record(_path(self.folder, self.number + 1))
        where = f" on {later.get('host')} at {later.get('time')}" if later else ""
        raise OperatorFault(
            f"attempt {self.number} of {self.folder} ends: attempt {self.number + 1} has started{where}, and only the "
            "newest may write to the folder. Give two runs two folders (run.folder)"
        )


def acquire(folder: Path, record: Mapping[str, Any]) -> Attempt:
    """Acquires a run folder as its next attempt, making the folder where there is none. Called by one rank."""
    attempts = folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.stem) for path in attempts.glob("*.json") if path.stem.isdigit()), default=0)
    while True:
        try:
            with open(_path(folder, number), "x", encoding="utf-8") as file:
                file.write(json.dumps(dict(record), indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:  # taken by a concurrent start
            number += 1
        else:
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
        "world": world,
        "command": command_line([sys.executable, *sys.orig_argv[1:]]),
        "versions": versions(),
        "environment": environment,
    }


def _path(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:05d}.json"


def attempt_record(path: Path) -> dict[str, Any]:
    """The record of an attempt; empty where it is not written yet, or cannot be read."""
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
