"""The parent watch: a rank ends when its launcher is gone.

The parent process is polled: `PR_SET_PDEATHSIG` would send its signal when the *thread* that started this process ends,
which need not be the end of the launcher. The deepspeed launcher is a chain, runner -> launch.py -> rank, of which a
SIGKILL to the runner leaves the rest running: there the grandparent is polled too.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from megadistill.distributed.launch import environment_rank
from megadistill.errors import RestartFault

POLL_SECONDS = 1.0


def terminate_with_parent(limit: float) -> None:
    """Starts a thread that sends SIGTERM to this rank when its launcher is gone, and exits `limit` seconds later.

    Does nothing in a process without a launcher (RANK is not set): it may outlive the shell that started it. Call it
    before torch.distributed starts, which sets RANK itself.
    """
    if "RANK" not in os.environ:
        return
    parent = os.getppid()
    runner = _deepspeed_runner(parent)
    threading.Thread(target=_poll, args=(parent, runner, limit), name="parent watch", daemon=True).start()


def write_stderr(line: str) -> None:
    """Writes a log line without taking a lock. The other end of the pipe may be gone."""
    with suppress(OSError):
        os.write(2, f"megadistill: {line}\n".encode())


def _poll(parent: int, runner: int | None, limit: float) -> None:
    while os.getppid() == parent and (runner is None or _parent_of(parent) == runner):
        time.sleep(POLL_SECONDS)
    rank = environment_rank()
    write_stderr(f"rank {rank}: its launcher is gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(limit)
    write_stderr(f"rank {rank}: still running {limit:.0f} s after its launcher was gone: exiting without a checkpoint")
    os._exit(RestartFault.exit_code)


def _deepspeed_runner(launcher: int) -> int | None:
    """The process that started deepspeed's launch.py on this node, if it is deepspeed's runner."""
    runner = _parent_of(launcher)
    if runner is None or "deepspeed.launcher.launch" not in command_of(launcher):
        return None
    command = command_of(runner)
    is_runner = "deepspeed.launcher.runner" in command or any(Path(part).name == "deepspeed" for part in command[:3])
    return runner if is_runner else None


def _parent_of(process: int) -> int | None:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:  # it has ended, or this is no Linux
        return None
    return int(stat.rpartition(")")[2].split()[1])


def command_of(process: int) -> list[str]:
    """Command line of a process of this host; empty where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
