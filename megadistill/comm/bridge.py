"""The bridge between the student's ranks and the teacher's: messages point to point, and signs of life.

It is a process group over all ranks of the launch that torch's default world knows nothing of: DeepSpeed has barriers
over the whole default world, so the student must be a world of its own.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
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
    """Shows that this rank lives, and ends the process when a partner shows no life for `limit` seconds.

    One thread talks to the store, which hangs where its host does; another one looks at the clock. A collective cannot
    be given up by whoever waits in it, so the process is ended: with one line, and the exit code of a fault that a
    restart can mend.
    """

    def __init__(self, store: Store, rank: int, partners: Sequence[int], *, limit: float) -> None:
        anything: Any = store
        self._store = PrefixStore("alive", anything.clone())  # a connection of its own: the run's may wait
        self._rank = rank
        self._limit = limit
        self._seen = {partner: (-1, time.monotonic()) for partner in partners}
        self._stopped = threading.Event()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        beats = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beats += 1
            with suppress(RuntimeError):  # the store is gone, and its host with it
                self._store.set(str(self._rank), str(beats))
                self._look()

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            silent = [partner for partner, (_, since) in self._seen.items() if now - since > self._limit]
            if silent and not self._stopped.is_set():
                print(
                    f"megadistill: rank {self._rank}: no sign of life from rank {silent[0]} for {self._limit:.0f} s: "
                    "it was killed or hangs; look for its own last lines",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RestartFault.exit_code)

    def _look(self) -> None:
        for partner, (beats, _) in self._seen.items():
            found = int(self._store.get(str(partner))) if self._store.check([str(partner)]) else -1
            if found != beats:
                self._seen[partner] = (found, time.monotonic())
