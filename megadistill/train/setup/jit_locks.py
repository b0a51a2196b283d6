"""Detection of stale locks of JIT builds, before a run waits for them.

The builder of C++ extensions of torch and DeepSpeed waits while the file `lock` is in a build's folder. A killed build
leaves it there, and every later process that needs the extension waits for ever, without a message.
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megadistill.errors import UserError

STALE_SECONDS = 600.0
"""Time without a change in a build's folder after which the build is taken to be dead: compilers write a file every few
seconds or minutes. A younger lock may be in use, on another node too; if not, the hang detector names it."""


def extensions_of(deepspeed_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the extensions that a run with these settings of DeepSpeed builds here; optimizers are torch's own.

    On a CPU messages within a node go through shared memory; on GPUs ZeRO++ has kernels that quantise, and NVMe disks
    are read by asynchronous I/O.
    """
    if not torch.accelerator.is_available():
        return ("deepspeed_shm_comm",)
    zero = deepspeed_config.get("zero_optimization", {})
    needed = {
        "quantizer": any(value for key, value in zero.items() if key.startswith("zero_quantized_")),
        "async_io": any(isinstance(value, dict) and value.get("device") == "nvme" for value in zero.values()),
    }
    return tuple(name for name, is_needed in needed.items() if is_needed)


def refuse_stale_jit_locks(extensions: Iterable[str]) -> None:
    """Looks at the builds of these extensions alone: the user's folder holds those of other programs, too.

    Raises:
        UserError: a lock is stale; the message has the command that removes it.
    """
    for lock in [extensions_folder() / name / "lock" for name in extensions]:
        idle = time.time() - _last_change(lock) if lock.exists() else 0.0
        if idle > STALE_SECONDS:
            raise UserError(
                f"{lock} is the lock of a JIT build that has written nothing for {idle / 60:.0f} minutes: the build "
                f"was killed, and a run that needs {lock.parent.name} would wait for ever. If no build is running, "
                f"rm {lock}"
            )


def extensions_folder() -> Path:
    """Folder of torch's extensions, a subfolder each: TORCH_EXTENSIONS_DIR, or one in the user's cache."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is not None:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch_extensions"
    if torch.version.hip is not None:
        accelerator = f"rocm{torch.version.hip.replace('.', '')}"
    elif torch.version.cuda is not None:
        accelerator = f"cu{torch.version.cuda.replace('.', '')}"
    else:
        accelerator = "cpu"
    return (
        Path(os.path.realpath(cache))
        / f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_{accelerator}"
    )


def _last_change(lock: Path) -> float:
    """Time of the last change in a build's folder, in seconds since 1970; now, where the lock is just being removed."""
    times = []
    with suppress(OSError):
        for each in lock.parent.iterdir():
            times.append(each.stat().st_mtime)
    return max(times) if lock.exists() and times else time.time()
