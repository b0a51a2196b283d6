"""Process groups outside of torch's default world, which is DeepSpeed's: it has barriers over all of that.

Torch has no public way to make one: `new_group` takes ranks of the default world. These are its own classes, and
`torch.distributed`'s collectives take them; what looks ranks up in its registry does not (`dist.get_rank`,
`destroy_process_group`), so who makes a group ends it.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore, Store

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""


def unregistered_group(
    store: Store, place: int, members: Sequence[int], timeout: timedelta, *, device: torch.device, name: str
) -> ProcessGroup:
    """A group of this device's default backend, for collectives. All members make it.

    `place`: this rank's in the group; `members`: by place, the ranks that messages name.
    """
    backend: Any = device_backend(PrefixStore(name, store), place, members, timeout, device=device, name=name)
    kind = ProcessGroup.BackendType.GLOO if device.type == "cpu" else ProcessGroup.BackendType.NCCL
    group: Any = ProcessGroup(PrefixStore(f"{name}_group", store), place, len(members))
    group._register_backend(device, kind, backend)
    group._set_default_backend(kind)
    group._set_group_name(name)
    return cast(ProcessGroup, group)


def host_backend(store: Store, place: int, size: int, timeout: timedelta) -> ProcessGroup:
    gloo: Any = ProcessGroupGloo(store, place, size, timeout)
    return cast(ProcessGroup, gloo)


def device_backend(
    store: Store, place: int, members: Sequence[int], timeout: timedelta, *, device: torch.device, name: str
) -> ProcessGroup:
    if device.type == "cpu":
        return host_backend(store, place, len(members), timeout)
    from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415  builds for a CPU have none

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Both are in the flight recorder and in torch's own messages.
    options.group_name = name  # type: ignore[assignment]
    options.global_ranks_in_group = list(members)
    nccl: Any = ProcessGroupNCCL(store, place, len(members), options)
    return cast(ProcessGroup, nccl)
