"""torch's flight recorder: the last collectives of each rank, written to the run folder when one of them hangs.

The files are pickles, and a pickle runs code when it is loaded: nothing here reads them. torch's own `torchfrtrace
FOLDER -p PREFIX` compares those of all ranks.
"""

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

WAITS_FOR_RANKS = True
"""A thread with a frame of this module may wait for torch's own locks (see `watchdog.stack_probe`)."""

BUFFERS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Variables with the number of collectives that are kept; the second is the former name."""
FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Variables with the prefix of the file that torch writes; it adds the rank."""
BUFFER_SIZE = 2000
"""Number of collectives, about 1 kB each: some steps of a student of 40 layers."""
HEARTBEAT_SECONDS = 480
"""torch's time limit for its NCCL watchdog's thread to move, after which it ends the process."""


def enable_flight_recorder(timeout: timedelta) -> None:
    """Keeps the last collectives, and has NCCL's watchdog write them when one has run for `timeout`.

    Call it before the first process group, which reads the variables. What the user has set stays.
    """
    if not any(name in os.environ for name in BUFFERS):
        os.environ[BUFFERS[0]] = str(BUFFER_SIZE)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # NCCL's own monitor must not end a process before this package's watchdog has named the rank that hangs.
    limit = max(HEARTBEAT_SECONDS, int(timeout.total_seconds()) + 60)
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(limit))


def is_recording() -> bool:
    return any(os.environ.get(name, "0") != "0" for name in BUFFERS)


def dump_prefix(prefix: Path) -> str:
    """The prefix of the files of torch and of `dump_flight_recorder`: `prefix`, or what the user has set.

    torch reads it when it writes.
    """
    for name in FILES:
        if name in os.environ:
            return os.environ[name]
    os.environ[FILES[0]] = str(prefix)
    return str(prefix)


def dump_flight_recorder(prefix: str) -> Path | None:
    """Writes this rank's last collectives; the file, or None where the recorder is off or has none.

    The watchdog calls it, since it ends a hanging run before NCCL's own does.
    """
    if not dist.is_initialized() or not is_recording():
        return None
    is_nccl = "nccl" in dist.get_backend()
    dump = getattr(_distributed_c10d, "_dump_nccl_trace" if is_nccl else "_dump_fr_trace", None)
    if dump is None:
        return None
    path = Path(f"{prefix}{dist.get_rank()}")
    with suppress(OSError, RuntimeError):
        path.write_bytes(dump())
        return path
    return None
