"""The bridge between the student's ranks and the teacher's: messages point to point.

It is a process group over all ranks of the launch that torch's default world knows nothing of: DeepSpeed has barriers
over the whole default world, so the student must be a world of its own.
"""

import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill import timeline
from megadistill.distributed.roles import Roles

WAITS_FOR_RANKS = True
"""The hang detector takes a frame of this module for a wait."""


@dataclass(frozen=True)
class Message:
    """A message on its way; `wait()` returns its buffer once it is there, or once it may be written again."""

    buffer: Tensor
    work: Work
    what: str
    source: int
    to: int
    number: int
    """Of those from one rank to the other."""
    is_sent: bool

    def wait(self) -> Tensor:
        with self._span():
            self.work.wait()
        return self.buffer

    def _span(self) -> AbstractContextManager[None]:
        if self.is_sent:
            return timeline.span(timeline.SEND, "flush")
        return timeline.message_span(timeline.WAIT, "wait for", self.what, self.source, self.to, self.number)


class Bridge:
    """Messages between ranks of the launch. Those from one rank to another arrive in order."""

    def __init__(self, store: Store, roles: Roles, rank: int, *, device: torch.device, timeout: timedelta) -> None:
        self.roles = roles
        self.rank = rank
        """Among all ranks of the launch."""
        self._group = _group(PrefixStore("bridge", store), rank, roles.world, device, timeout)
        self._sent, self._expected = Counter[int](), Counter[int]()
        self._group.barrier().wait()
        self.met = time.monotonic()
        """When all ranks of the launch were there, by this one's clock: those of two nodes can be compared."""

    def send(self, message: Tensor, to: int, *, what: str) -> Message:
        """`what` it is: a word for a timeline."""
        number = self._sent[to]
        self._sent[to] += 1
        with timeline.message_span(timeline.SEND, "send", what, self.rank, to, number):
            work = self._group.send([message], to, 0)
        return Message(message, work, what, self.rank, to, number, is_sent=True)

    def expect(self, buffer: Tensor, source: int, *, what: str) -> Message:
        number = self._expected[source]
        self._expected[source] += 1
        work = self._group.recv([buffer], source, 0)
        return Message(buffer, work, what, source, self.rank, number, is_sent=False)

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
