"""The messages between the student's ranks and those of a teacher with ranks of its own.

They have process groups outside of torch's default world: DeepSpeed has barriers over the whole default world, so the
student must be a world of its own. Each replica of the teacher has two groups, of its clients and its stages: requests
travel in host memory, over gloo; packets between stages and answers in the device's, over its own backend.

NCCL runs what two ranks exchange in the order in which each of them issues it, and makes a communicator for the two at
their first message, where each end waits on the host for the other. So no two ranks have messages in both directions
on the device, and all of its communicators are made here, in one order.
"""

from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.distributed.groups.unregistered import device_backend, host_backend
from megadistill.distributed.p2p import Endpoint, chain
from megadistill.distributed.rendezvous import store_barrier
from megadistill.distributed.roles import Roles

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""


class Bridge:
    """This rank's messages to the others of its replica. Collective: all ranks of the launch make one, and close it."""

    def __init__(self, store: Store, roles: Roles, rank: int, *, device: torch.device, timeout: timedelta) -> None:
        self.roles = roles
        self.rank = rank
        """Rank in the launch."""
        replica = roles.replica(rank)
        members = roles.members(replica)
        place, size = members.index(rank), len(members)
        self.clients = range(len(roles.clients(replica)))
        """Places of the replica's clients in both groups."""
        self.stages = range(len(self.clients), size)
        """Places of its stages."""
        name = f"bridge_{replica}"
        self._host_group = host_backend(PrefixStore(f"{name}_host", store), place, size, timeout)
        self._device_group = device_backend(
            PrefixStore(f"{name}_device", store), place, members, timeout, device=device, name=f"{name}_device"
        )
        self.on_host = Endpoint(self._host_group, rank=place, ranks=members)
        """Messages in host memory."""
        self.on_device = Endpoint(self._device_group, rank=place, ranks=members)
        """Messages in the device's memory: from a stage to the next one, and from the last one to the clients."""
        self.on_device.connect([*chain(self.stages), *((self.stages[-1], client) for client in self.clients)], device)
        self.rendezvous_time = store_barrier(store, "bridge", rank, roles.world, timeout)
        """This node's monotonic clock (s) when all ranks of the launch had joined; relates the clocks of two nodes."""

    def close(self) -> None:
        """Ends the groups, which `destroy_process_group` does not know. No message may be under way."""
        self._device_group.shutdown()
        self._host_group.shutdown()
