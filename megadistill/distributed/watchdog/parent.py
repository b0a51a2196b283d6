"""No rank outlives its launcher. It knows nothing else of a run.

The parent is looked at, and not `PR_SET_PDEATHSIG` asked for: that signal comes when the *thread* that started this
process ends, which need not be the end of the launcher. The deepspeed launcher is a chain, runner -> launch.py -> rank,
of which a SIGKILL to the runner leaves the rest at work: there the grandparent is looked at too.
"""

import os
import signal
import threading
import time
from pathlib import Path

from megadistill.errors import RestartFault

LOOK_SECONDS = 1.0


def end_with_launcher(limit: float) -> None:
    """From now on the end of the launcher is a SIGTERM to this rank; `limit` seconds later it is the end at once.

    Nothing happens in a process that no launcher started (RANK is not set): the end of a shell is none of its business.
    To be called before torch.distributed starts, which sets RANK itself.
    """
    if "RANK" not in os.environ:
        return
    parent = os.getppid()
    runner = _deepspeed_runner(parent)
    threading.Thread(target=_look, args=(parent, runner, limit), name="launcher", daemon=True).start()


def _look(parent: int, runner: int | None, limit: float) -> None:
    while os.getppid() == parent and (runner is None or _parent_of(parent) == runner):
        time.sleep(LOOK_SECONDS)
    _say("its launcher is gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(limit)
    _say(f"its launcher is gone and it has not stopped in {limit:.0f} s: leaving without a checkpoint")
    os._exit(RestartFault.exit_code)


def _say(line: str) -> None:
    try:
        os.write(2, f"megadistill: rank {os.environ['RANK']}: {line}\n".encode())
    except OSError:  # the launcher held the other end of the pipe
        return


def _deepspeed_runner(launcher: int) -> int | None:
    """The process that started deepspeed's launch.py on this node, if it is deepspeed's runner."""
    runner = _parent_of(launcher)
    if runner is None or "deepspeed.launcher.launch" not in _command(launcher):
        return None
    command = _command(runner)
    is_runner = "deepspeed.launcher.runner" in command or any(Path(part).name == "deepspeed" for part in command[:3])
    return runner if is_runner else None


def _parent_of(process: int) -> int | None:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:  # it has ended, or this is no Linux
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _command(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
