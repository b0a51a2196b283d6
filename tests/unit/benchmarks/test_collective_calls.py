"""benchmarks.collective_calls: the calls of a process group of one rank, and what a ring of several would send."""

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup, HashStore

from benchmarks.collective_calls import Collective, Collectives


def _group(ranks: int, name: str) -> dist.ProcessGroup:
    """A group whose collectives move nothing."""
    group: Any = dist.ProcessGroup(HashStore(), 0, ranks)
    group._register_backend(
        torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, FakeProcessGroup._create_internal(0, ranks)
    )
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._set_group_name(name)
    return cast(dist.ProcessGroup, group)


def test_calls_are_recorded_with_their_group_and_bytes() -> None:
    group = _group(4, "four")
    with Collectives() as collectives:
        dist.all_reduce(torch.zeros(3, dtype=torch.float64), group=group)
        torch.zeros(5).add_(1)
        dist.reduce_scatter_tensor(torch.zeros(2), torch.zeros(8), group=group)
    assert collectives.calls == [Collective("allreduce", 4, 24), Collective("reduce_scatter_base", 4, 32)]
    assert {call.group for call in collectives.calls} == {"four"}


@pytest.mark.parametrize(
    ("name", "sent"), [("allgather_base", 75.0), ("reduce_scatter_base", 75.0), ("allreduce", 150.0)]
)
def test_a_rank_of_a_ring_sends_all_but_its_own_part(name: str, sent: float) -> None:
    assert Collective(name, 4, 100).sent == sent
    assert Collective(name, 1, 100).sent == 0


def test_a_message_is_sent_whole_by_one_of_two() -> None:
    assert [Collective(name, 4, 100).sent for name in ("send", "recv")] == [100, 0]
