"""`python -m megadistill.tracking RUN TRACKER SECONDS`: the process that a run starts for a tracker.

Its standard input ends with the run, however that ends. Then it sends what is left, for SECONDS at most.
"""

import logging
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from megadistill.io import locked_folder
from megadistill.tracking.follower import Follower

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler sends to every process of a job: the run obeys them, and then ends this process."""


def wait_for_end(seconds: float) -> bool:
    """Waits for the end of standard input, at most `seconds`; returns whether it has come."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


def end_after_run(seconds: float) -> None:
    """Ends this process and those that the tracker's package has started, `seconds` after the end of the run.

    On a thread of its own, since the tracker may block the main one for ever.
    """
    select.select([sys.stdin], [], [])
    time.sleep(seconds)
    os.killpg(0, signal.SIGKILL)


def main(folder: Path, tracker: str, seconds: float) -> int:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    threading.Thread(target=end_after_run, args=(seconds,), daemon=True).start()
    # What the tracker's package prints goes nowhere: it may be anything. Lines of our own go to the run's stderr.
    own = os.fdopen(os.dup(2), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    logging.basicConfig(stream=own, format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    with locked_folder(folder / "tracking" / f"{tracker}.lock"):  # that of an earlier attempt may still be sending
        return 0 if Follower(folder, tracker).follow(wait_for_end) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
