"""The bridge's process groups, the time limits of all others, and the barrier at which a launch ends."""

import threading
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from megadistill.distributed.groups import unregistered
from megadistill.distributed.rendezvous import store_barrier
from megadistill.distributed.topology import Topology

MINUTE = timedelta(minutes=1)


class _Nccl:
    """Records how it is made."""

    class Options:
        _timeout = timedelta(minutes=10)
        group_name = ""
        global_ranks_in_group: Sequence[int] = ()

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.rank, self.size, self.options = rank, size, options


def test_the_devices_group_has_a_name_and_the_launchs_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", _Nccl, raising=False)
    group: Any = unregistered.device_backend(
        HashStore(), 1, [4, 5, 9], MINUTE, device=torch.device("cuda"), name="bridge_7_device"
    )
    assert isinstance(group, _Nccl)
    assert (group.rank, group.size) == (1, 3)
    assert (group.options._timeout, group.options.group_name) == (MINUTE, "bridge_7_device")
    assert group.options.global_ranks_in_group == [4, 5, 9]


def test_requests_have_a_group_of_the_host_on_any_device() -> None:
    group: Any = unregistered.host_backend(HashStore(), 0, 1, MINUTE)
    assert group.name() == "gloo"
    assert group.options._timeout == MINUTE
    group.shutdown()


class _CountingStore:
    """The calls of all ranks, on a store that they share."""

    def __init__(self) -> None:
        self.store, self.calls = HashStore(), list[str]()
        self.store.set_timeout(MINUTE)

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.store, name)


@pytest.mark.parametrize("last", [0, 2])
def test_all_ranks_meet_at_the_store_and_its_owner_leaves_last(last: int) -> None:
    world, store = 5, _CountingStore()
    left: list[int] = []
    others = threading.Barrier(world)

    def rank_of(rank: int) -> None:
        others.wait()
        store_barrier(store, "end", rank, world, MINUTE)  # type: ignore[arg-type]
        left.append(rank)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world) if rank != last]
    for thread in threads:
        thread.start()
    others.wait()
    assert not left
    store_barrier(store, "end", last, world, MINUTE)  # type: ignore[arg-type]
    if last == 0:
        assert store.store.get("end-left") == str(world).encode(), "rank 0 goes when the others have gone"
    for thread in threads:
        thread.join()
    assert len(left) == world - 1
    assert len(store.calls) <= 4 * world, "no rank polls"


def test_a_rank_that_does_not_come_is_an_error() -> None:
    store = HashStore()
    with pytest.raises(RuntimeError):
        store_barrier(store, "end", 0, 2, timedelta(milliseconds=20))


def test_a_group_of_the_host_alone_gets_the_time_limit_beside_those_of_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library may make one on a GPU, whose backend it does not have."""
    store, host = HashStore(), torch.device("cpu")
    group = dist.ProcessGroup(store, 0, 1)
    group._register_backend(host, dist.ProcessGroup.BackendType.GLOO, dist.ProcessGroupGloo(store, 0, 1, MINUTE))
    monkeypatch.setattr(distributed_c10d, "_world", SimpleNamespace(pg_map={group: None}))
    Topology(0, 1, 0, 1, torch.device("cuda"), timeout=2 * MINUTE).limit_all_groups()
    backend: Any = group._get_backend(host)
    assert backend.options._timeout == 2 * MINUTE
    backend.shutdown()
