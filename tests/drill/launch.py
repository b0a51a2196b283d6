"""Launches ranks as torchrun does, from a process that has imported everything, and sees how each of them ends."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.drill.faults import BLOCKED, inject

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks.preload", "tests.drill.faults"])

MARK = "MEGADISTILL_DRILL"
"""Environment variable of every rank of a drill, to recognise those that still run."""


def _rank(environment: dict[str, str], arguments: list[str], faults: list[str], log: str) -> None:
    import torch

    from megadistill.cli.main import main

    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    inject(faults)
    sys.argv = ["megadistill", *arguments]
    main()


@dataclass
class Ranks:
    """The processes of one attempt."""

    processes: list[ForkServerProcess]
    logs: list[Path]
    signs: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def alive(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def wait(self, seconds: float = 90.0) -> list[int]:
        """The exit codes, once all have ended; a signal's as its negative number.

        Raises:
            AssertionError: some rank is still there after `seconds`; all are killed.
        """
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        left = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        if left:
            self.send(signal.SIGKILL)
            raise AssertionError(f"ranks {left} were still there after {seconds:.0f} s\n{self.output}")
        return [process.exitcode or 0 for process in self.processes]

    def send(self, number: signal.Signals, *, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for place, process in enumerate(self.processes):
            if rank in (None, place) and process.exitcode is None:
                assert process.pid is not None
                os.kill(process.pid, number)

    def until_blocked(self, seconds: float = 60.0) -> None:
        until(lambda: (self.signs / BLOCKED).exists(), seconds, "no rank came to where it should wait")

    @property
    def output(self) -> str:
        return "\n".join(f"--- rank {place}\n{log.read_text(errors='replace')}" for place, log in enumerate(self.logs))


def until(holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Waits. Raises AssertionError: it does not hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"{otherwise} within {seconds:.0f} s")
        time.sleep(0.01)


def launch(
    arguments: Sequence[str],
    *,
    world: int,
    faults: Mapping[int, Sequence[str]],
    folder: Path,
    environment: Mapping[str, str],
) -> Ranks:
    """`megadistill ARGUMENTS` on `world` ranks; `faults` by rank; their output goes to files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, logs = [], []
    for rank in range(world):
        own = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "DRILL_SIGNS": str(folder),
            **marked(),
            **environment,
        }
        log = folder / f"rank-{rank}.log"
        log.touch()
        process = _context.Process(target=_rank, args=(own, list(arguments), list(faults.get(rank, ())), str(log)))
        process.start()
        processes.append(process)
        logs.append(log)
    return Ranks(processes, logs, folder)


def marked() -> dict[str, str]:
    """The environment variable that marks this drill's processes."""
    return {MARK: str(os.getpid())}


def left_over() -> list[int]:
    """Process ids of this drill's ranks that still run."""
    processes = []
    mark = f"{MARK}={os.getpid()}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                processes.append(int(path.parent.name))
        except OSError:  # another user's, or ended
            continue
    return processes
