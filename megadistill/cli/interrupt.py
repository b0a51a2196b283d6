"""Signals that end a command: it cleans up, prints one line that says what is kept, and exits with 3.

A training run replaces these handlers by its own as soon as it has a step to finish (`train.resilience.preemption`).
"""

import os
import signal
import time
from types import FrameType
from typing import NoReturn

from megadistill.errors import RestartFault

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

SAME_REQUEST_SECONDS = 2.0
"""Signals closer than this are one: Ctrl-C comes from the terminal, and again from a launcher."""


class Interrupts:
    """The first signal raises KeyboardInterrupt where the command is; a second one ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        """The first signal; None: there was none."""
        self._process = os.getpid()
        self._since = 0.0

    def handle(self) -> None:
        """Handles the signals from now on, less those that the caller ignores (as SIGINT of a shell's `&`).

        Under a launcher SIGTERM keeps its default: it ends ranks that wait for a failed one, and Python's handlers run
        only when such a wait is over.
        """
        alone = all(os.environ.get(name, "") in ("", "1") for name in ("WORLD_SIZE", "SLURM_NTASKS"))
        for each in SIGNALS:
            ignored = signal.getsignal(each) == signal.SIG_IGN
            if not ignored and (alone or each is not signal.SIGTERM):
                signal.signal(each, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: as if there was no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, now
            raise KeyboardInterrupt
        if now - self._since > SAME_REQUEST_SECONDS:
            _end(f"second signal ({signal.Signals(number).name}): ending at once")


def _end(line: str) -> NoReturn:
    os.write(2, f"megadistill: {line}\n".encode())  # not by print: the interrupted code may hold its lock
    os._exit(RestartFault.exit_code)
