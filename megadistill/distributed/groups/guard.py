"""Collectives across replicas that end when a replica is lost, on all ranks of another one alike, so that it continues.

A replica that is lost never answers. gloo notices a process that was killed at once, and a host without power only
after its time limit; NCCL may notice neither. So a wait across replicas also ends when the run's members say so (see
`membership`). Its result is unknown then: each rank tells the others of its replica, and all of them raise
`ReplicasChanged` at the same place.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from megadistill import timeline

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

LOOK_SECONDS = 0.2
"""Time (s) between two looks at whether the members have changed, while a rank of a CPU waits."""
DEVICE_LOOK_SECONDS = 0.0005
"""The same, of an accelerator, whose collectives the host cannot wait for and look at the same time."""


class ReplicasChanged(Exception):
    """The replicas of the run have changed: a step begins again, with those that are here."""


@dataclass
class Guard:
    """The members of one epoch, as this rank waits for them."""

    break_off: Callable[[str], None]
    """Tells all ranks of all replicas, with the reason, that this epoch has ended."""
    broken: threading.Event = field(default_factory=threading.Event)
    """Set when this epoch has ended, on any rank."""
    waiting: Callable[[bool], None] = lambda _: None
    """Called with True by a rank that waits for other replicas, and with False when it does no longer."""

    def finish(self, start: Callable[[], Work | None], *, on_cpu: bool) -> bool:
        """Starts a collective across replicas, and waits for it. Whether it ended well; False: a replica is lost."""
        self.waiting(True)
        try:
            if self.broken.is_set():
                return False
            work = start()
            if work is not None:
                with timeline.span(timeline.WAIT, "wait for replicas"):
                    _wait(work, self.broken, on_cpu=on_cpu)
        except (RuntimeError, dist.DistError) as error:
            self.break_off(str(error).splitlines()[0][:200])
            return False
        else:
            return not self.broken.is_set()
        finally:
            self.waiting(False)

    def watch(self, group: ProcessGroup, until_broken: Callable[[], None]) -> threading.Thread:
        """A thread that ends what `group` waits for when the epoch has ended, which `until_broken` waits for."""

        def work() -> None:
            with suppress(RuntimeError, dist.DistError):  # the store has gone, and its host with it
                until_broken()
            self.broken.set()
            with suppress(RuntimeError, dist.DistError):
                group.abort()

        thread = threading.Thread(target=work, name="members", daemon=True)
        thread.start()
        return thread


def _wait(work: Work, broken: threading.Event, *, on_cpu: bool) -> None:
    """Raises RuntimeError: the collective failed. Returns without its end when `broken` is set."""
    while not work.is_completed() and not broken.is_set():
        if on_cpu:
            with suppress(RuntimeError, dist.DistError):  # a look, or the failure, which `is_completed` tells apart
                work.wait(timedelta(seconds=LOOK_SECONDS))
        else:
            time.sleep(DEVICE_LOOK_SECONDS)
    if work.is_completed():
        work.wait()
