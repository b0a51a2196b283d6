"""The process beside a run that sends its records to a tracker: started, left alone, ended."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megadistill.redaction import printable

CLOSE_SECONDS = 20.0
"""Time that a tracker has to send what is left when a run ends."""

STOP_SECONDS = 3.0
"""The same after a stop request, as a scheduler may kill the run soon."""

LAST_SECONDS = 600.0
"""Time that a tracker has when the run has ended without waiting for it: by a fault, or a kill."""

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make the process a rank."""

logger = logging.getLogger(__name__)


class TrackerProcesses:
    """One process for each tracker, of which none can hold up or end the run."""

    def __init__(self, folder: Path, trackers: Sequence[str]) -> None:
        """`trackers`: names of `CONNECTIONS`. The folder has its recipe.json."""
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        for tracker in trackers:
            command = [sys.executable, "-m", "megadistill.tracking", str(folder), tracker, str(LAST_SECONDS)]
            try:
                self._processes[tracker] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
                )
            except OSError as error:
                logger.warning("tracker %s not started: %s; the run goes on without it", tracker, error.strerror)

    def release(self) -> None:
        """Lets the processes send what is left and end, without waiting for them: the run ended by a fault."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()

    def close(self, *, seconds: float = CLOSE_SECONDS) -> None:
        """Lets them send what is left, for `seconds` all together; one that takes longer is ended, and named."""
        self.release()
        end = time.monotonic() + seconds
        for tracker, process in self._processes.items():
            try:
                code = process.wait(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its session: the package may have processes of its own
                process.wait()
                self._warn(tracker, f"has not finished within {seconds:g} s and was ended")
            else:
                if code:
                    self._warn(tracker, "has not got everything")
        self._processes.clear()

    def _warn(self, tracker: str, what: str) -> None:
        folder = printable(str(self._folder))
        taken = f", and `wandb sync {folder}/tracking/wandb/run-*` what W&B had taken" if tracker == "wandb" else ""
        logger.warning(
            "tracker %s %s: `megadistill track %s --to %s --once` sends the rest%s",
            *(tracker, what, folder, tracker, taken),
        )
