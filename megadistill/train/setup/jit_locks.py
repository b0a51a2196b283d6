"""Detection of stale locks of JIT builds, before a run waits for them.

The builder of C++ extensions of torch and DeepSpeed waits while the file `lock` is in a build's folder. A killed build
leaves it there, and every later process that needs the extension waits for ever, without a message.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from megadistill.errors import UserError

STALE_SECONDS = 600.0
"""Time without a change in a build's folder after which the build is taken to be dead: compilers write a file every few
seconds or minutes. A younger lock may be in use, on another node too; if not, the hang detector names it."""


def refuse_stale_jit_locks() -> None:
    """Raises UserError: a lock is stale; the message has the command that removes it."""
    for lock in sorted(extensions_folder().glob("*/lock")):
        idle = time.time() - _last_change(lock)
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
