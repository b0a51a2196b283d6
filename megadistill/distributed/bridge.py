"""The messages between the student's ranks and those of a teacher with ranks of its own.

They have a process group over all ranks of the launch, outside of torch's default world: DeepSpeed has barriers over
the whole default world, so the student must be a world of its own.
"""

import time
from datetime import timedelta
from typing import Any, cast

import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.distributed.p2p import Endpoint
from megadistill.distributed.roles import Roles

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""


class Bridge(Endpoint):
    """This rank's messages to any rank of the launch. Collective: all ranks of the launch make one."""

    def __init__(self, store: Store, roles: Roles, rank: int, *, device: torch.device, timeout: timedelta) -> None:
        self.roles = roles
        self.rank = rank
        """Rank in the launch."""
        group = _process_group(PrefixStore("bridge", store), rank, roles.world, device, timeout)
        super().__init__(group, rank=rank, ranks=range(roles.world))
        self.barrier()
        self.rendezvous_time = time.monotonic()
        """This node's monotonic clock (s) when all ranks of the launch had joined; relates the clocks of two nodes."""

    def barrier(self) -> None:
        """Waits for all ranks of the launch."""
        assert self._group is not None
        self._group.barrier().wait()


def _process_group(store: Store, rank: int, world: int, device: torch.device, timeout: timedelta) -> ProcessGroup:
    if device.type == "cpu":
        gloo: Any = ProcessGroupGloo(store, rank, world, timeout)
        return cast(ProcessGroup, gloo)
    from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415  builds for a CPU have none

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    nccl: Any = ProcessGroupNCCL(store, rank, world, options)
    return cast(ProcessGroup, nccl)
