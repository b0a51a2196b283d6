"""The bridge between the student's ranks and the teacher's: messages point to point.

It is a process group over all ranks of the launch that torch's default world knows nothing of: DeepSpeed has barriers
over the whole default world, so the student must be a world of its own.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.comm.roles import Roles


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
