"""The bridge between the student's ranks and the teacher's: messages point to point, and signs of life.

It is a process group over all ranks of the launch that torch's default world knows nothing of: DeepSpeed has barriers
over the whole default world, so the student must be a world of its own.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.comm.roles import Roles
from megadistill.errors import RestartFault

BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Message:
    """A message on its way; `wait()` returns its buffer once it is there, or once it may be written again."""

    buffer: Tensor
    work: Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.buffer


class Bridge:
    """Messages between ranks of the launch. Those from one rank to another arrive in order."""

    def __init__(self, store: Store, roles: Roles, rank: int, *, device: torch.device, timeout: timedelta) -> None:
        self.roles = roles
        self.rank = rank
        """Among all ranks of the launch."""
        self._group = _group(PrefixStore("bridge", store), rank, roles.world, device, timeout)
        self._group.barrier().wait()

    def send(self, message: Tensor, to: int) -> Message:
        return Message(message, self._group.send([message], to, 0))

    def expect(self, buffer: Tensor, source: int) -> Message:
        return Message(buffer, self._group.recv([buffer], source, 0))

    def barrier(self) -> None:
        """Of all ranks of the launch."""
        self._group.barrier().wait()


def _group(store: Store, rank: int, world: int, device: torch.device, timeout: timedelta) -> ProcessGroup:
    if device.type == "cpu":
        gloo: Any = ProcessGroupGloo(store, rank, world, timeout)
        return cast(ProcessGroup, gloo)
    from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415  builds for a CPU have none

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    nccl: Any = ProcessGroupNCCL(store, rank, world, options)
    return cast(ProcessGroup, nccl)


class Heartbeat:
    """A thread that shows that this rank lives, and ends the process when a partner shows no life for `limit` seconds.

    A collective cannot be waited for with a limit and given up: the process is ended, with one line and the exit code
    of a fault that a restart can mend.
    """

    def __init__(self, store: Store, rank: int, partners: Sequence[int], *, limit: float) -> None:
        self._store = PrefixStore("alive", store)
        self._rank = rank
        self._limit = limit
        self._seen = {partner: (-1, time.monotonic()) for partner in partners}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        beats = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beats += 1
            try:
                self._store.set(str(self._rank), str(beats))
                silent = self._silent()
            except RuntimeError:  # the store is gone, and its host with it
                silent = sorted(self._seen)
            if silent and not self._stopped.is_set():
                print(
                    f"megadistill: rank {self._rank}: no sign of life from rank {silent[0]} for {self._limit:.0f} s: "
                    "it was killed or hangs; look for its own last lines",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RestartFault.exit_code)

    def _silent(self) -> list[int]:
        now = time.monotonic()
        for partner, (beats, since) in self._seen.items():
            found = int(self._store.get(str(partner))) if self._store.check([str(partner)]) else -1
            if found != beats:
                self._seen[partner] = (found, now)
            elif now - since > self._limit:
                return [partner]
        return []
