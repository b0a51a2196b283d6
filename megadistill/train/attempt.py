"""Room `train`: attempts at a run. Each start has a number, and only the newest may touch the run folder.

A node that was cut off keeps its ranks running, and a frozen process can thaw: `attempts/00002.json` comes to be by an
exclusive create, and the attempt before it finds the file when it next wants to commit, to delete, or to take a step.
"""

import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megadistill.errors import OperatorFault
from megadistill.train.run_folder import versions

MAX_RECORD_BYTES = 1 << 20

RECORDED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HOSTNAME", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE",
)  # fmt: skip
RECORDED_PREFIXES = ("GLOO_", "NCCL_", "SLURM_", "TORCHELASTIC_", "TORCH_NCCL_")

_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_NO_SECRET = re.compile(r"tokens|tokenize", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{12,}|xox[a-z]-[\w-]+"
    r"|eyJ[\w-]{10,}\.[\w-]+\.[\w-]*)|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
    r"|(?<=[?&])[\w.-]*(?i:key|token|secret|passw|credential|sig)[\w.-]*=[^&#\s]+"  # of a presigned URL
)


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
        if (name in RECORDED_VARIABLES or name.startswith(RECORDED_PREFIXES)) and not _names_a_secret(name)
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


def command_line(arguments: list[str]) -> list[str]:
    """Arguments of a command without the values of `--key=value` and `--key value` whose name says a secret."""
    shown, hide = [], False
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        secret = _names_a_secret(name)
        if hide or (separator and secret):
            shown.append(f"{name}=***" if separator and not hide else "***")
        else:
            shown.append(without_secrets(argument))
        hide = secret and not separator and argument.startswith("-") and not hide
    return shown


def without_secrets(value: str) -> str:
    """`value` with what has the form of a well-known key, or of a URL's password, as `***`."""
    return _SECRET_VALUE.sub("***", value)


def _names_a_secret(name: str) -> bool:
    return _SECRET_NAME.search(_NO_SECRET.sub("", name)) is not None


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
