"""Locks that a killed JIT build left behind, found before they are waited for. It knows no ranks and builds nothing.

torch's builder of C++ extensions, DeepSpeed's too, waits for as long as the file `lock` lies in a build's folder. A
build that is killed leaves it there, and every later process that needs the extension waits for ever, without a word.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from megadistill.errors import UserError

STALE_SECONDS = 600.0
"""Without a change in its folder for so long a build is dead: the compiler writes a file every few seconds or minutes.
What is younger may be at work, on another node too. If it is not, the watch tells which lock start-up waits for."""


def refuse_stale_jit_locks() -> None:
    """Raises UserError: a build has left its lock behind; the line says how to remove it."""
    for lock in sorted(extensions_folder().glob("*/lock")):
        idle = time.time() - _last_change(lock)
        if idle > STALE_SECONDS:
            raise UserError(
                f"{lock} is the lock of a JIT build that has written nothing for {idle / 60:.0f} minutes: it was "
                f"killed, and whatever needs {lock.parent.name} would wait for ever. If nothing builds there, rm {lock}"
            )


def extensions_folder() -> Path:
    """Where torch builds extensions, one folder for each: TORCH_EXTENSIONS_DIR, or one in the user's cache."""
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
    """In the folder of a build, in seconds since 1970; now, where the lock is being removed."""
    times = []
    with suppress(OSError):
        for each in lock.parent.iterdir():
            times.append(each.stat().st_mtime)
    return max(times) if lock.exists() and times else time.time()
