"""Collectives over a process group, which do nothing for a group of None (a single process).

Those of a run with replicas (`RunGroup`) go in two levels: over the ranks of each replica, then over those with the
same place in their replicas. No collective has more ranks than a replica, or than there are replicas.

Legend: g ranks of the group, n rows.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill import timeline

Value = TypeVar("Value")

# torch 2.11 has them under the names that torch 2.13 warns of.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""


@dataclass(frozen=True)
class RunGroup:
    """All ranks of R replicas, in the order of replicas; both levels have the same ranks in each of theirs."""

    within: ProcessGroup | None
    """The ranks of this replica; None where it has one."""
    across: ProcessGroup
    """The ranks with this one's place in their replicas."""


Group = ProcessGroup | RunGroup


def group_size(group: Group | None) -> int:
    if isinstance(group, RunGroup):
        return group_size(group.within) * group_size(group.across)
    return 1 if group is None else group.size()


def group_rank(group: Group | None) -> int:
    if isinstance(group, RunGroup):
        return group_rank(group.across) * group_size(group.within) + group_rank(group.within)
    return 0 if group is None else group.rank()


@dataclass(frozen=True)
class Pending:
    """A collective under way. Its source must not be written to until `wait` returns."""

    result: Tensor
    source: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The result. Later work on the same stream of the device may read it."""
        if self.work is not None:
            with timeline.span(timeline.WAIT, "wait for ranks"):
                self.work.wait()
        return self.result


def start_all_gather_rows(rows: Tensor, group: ProcessGroup | None) -> Pending:
    """[n, ...] of every rank -> [g·n, ...], in rank order. Every rank passes the same shape."""
    if group is None:
        return Pending(rows, rows, None)
    source = rows.contiguous()
    gathered = rows.new_empty(group_size(group) * rows.shape[0], *rows.shape[1:])
    return Pending(gathered, source, _all_gather(gathered, source, group=group, async_op=True))


def start_reduce_scatter_rows(rows: Tensor, group: ProcessGroup | None, *, out: Tensor | None = None) -> Pending:
    """[g·n, ...] of every rank -> [n, ...]: this rank's block of the sum over ranks, in `out` where there are ranks."""
    if group is None:
        return Pending(rows, rows, None)
    source = rows.contiguous()
    block = rows.new_empty(rows.shape[0] // group_size(group), *rows.shape[1:]) if out is None else out
    return Pending(block, source, _reduce_scatter(block, source, group=group, async_op=True))


def all_gather_rows(rows: Tensor, group: Group | None) -> Tensor:
    """[n, ...] of every rank -> [g·n, ...], in rank order. Every rank passes the same shape."""
    if isinstance(group, RunGroup):
        return all_gather_rows(all_gather_rows(rows, group.within), group.across)
    return start_all_gather_rows(rows, group).wait()


def reduce_scatter_rows(rows: Tensor, group: ProcessGroup | None, *, out: Tensor | None = None) -> Tensor:
    """[g·n, ...] of every rank -> [n, ...]: this rank's block of the sum over ranks, in `out` where there are ranks."""
    return start_reduce_scatter_rows(rows, group, out=out).wait()


def all_reduce_sum(values: Tensor, group: Group | None) -> Tensor:
    """Sums over ranks, in place; returns `values`."""
    return _all_reduce(values, dist.ReduceOp.SUM, group)


def all_reduce_max(values: Tensor, group: Group | None) -> Tensor:
    """The largest over ranks, in place; returns `values`."""
    return _all_reduce(values, dist.ReduceOp.MAX, group)


def _all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: Group | None) -> Tensor:
    """Within a replica first: so ranks with the same place in theirs have the same bits, whatever the order of sums."""
    if isinstance(group, RunGroup):
        return _all_reduce(_all_reduce(values, op, group.within), op, group.across)
    if group is not None:
        dist.all_reduce(values, op=op, group=group)
    return values


def scatter_rows(rows: Tensor | None, out: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
    """Sends block i of rank `source`'s `rows` [g·n, ...] to rank i of the group, which returns it as `out` [n, ...]."""
    if group is None:
        assert rows is not None
        return rows
    blocks = list(rows.contiguous().chunk(group_size(group))) if rows is not None else None
    dist.scatter(out, blocks, group=group, group_src=source)
    return out


def barrier(group: Group | None) -> None:
    if isinstance(group, RunGroup):
        barrier(group.within)
        barrier(group.across)  # its ranks come from their replicas' barriers
    elif group is not None:
        dist.barrier(group=group)


def all_gather_objects(own: Value, group: Group | None) -> list[Value]:
    """The object of every rank, which pickle can copy, in rank order."""
    if isinstance(group, RunGroup):
        of_replicas = all_gather_objects(all_gather_objects(own, group.within), group.across)
        return [each for of_replica in of_replicas for each in of_replica]
    objects = [own] * group_size(group)
    if group is not None:
        dist.all_gather_object(objects, own, group=group)
    return objects


def broadcast_object(own: Value, group: Group | None, *, source: int = 0) -> Value:
    """The object of rank `source` of the group, which pickle can copy, on every rank."""
    if isinstance(group, RunGroup):
        replica, place = divmod(source, group_size(group.within))
        if group_rank(group.within) == place:
            own = broadcast_object(own, group.across, source=replica)
        return broadcast_object(own, group.within, source=place)
    objects = [own]
    if group is not None:
        dist.broadcast_object_list(objects, group=group, group_src=source)
    return objects[0]


def broadcast_from_first(tensor: Tensor, group: Group | None) -> None:
    """Copies the contiguous tensor of the group's first rank, of any type, into that of every other rank.

    A rank that receives returns when it has the tensor, on any device: of broadcasts that only wait in its queue, each
    would have had its time limit since it came there, and the last of many that of all.
    """
    if isinstance(group, RunGroup):
        if group_rank(group.within) == 0:
            broadcast_from_first(tensor, group.across)
        broadcast_from_first(tensor, group.within)
    elif group is not None and tensor.numel():
        dist.broadcast(tensor.detach().view(-1).view(torch.uint8), group=group, group_src=0)
        if group_rank(group) and tensor.device.type != "cpu":
            torch.accelerator.synchronize(tensor.device)


def first_false(flag: bool, device: torch.device, group: Group | None) -> int | None:
    """The lowest rank of the group whose flag is false; None where all are true. A host-device sync."""
    ranks = group_size(group)
    value = torch.full((), ranks if flag else group_rank(group), dtype=torch.int32, device=device)
    lowest = int(_all_reduce(value, dist.ReduceOp.MIN, group).item())
    return None if lowest == ranks else lowest


def all_true(flag: bool, device: torch.device, group: Group | None) -> bool:
    """Whether the flag is true on every rank. A host-device sync."""
    return flag if group is None else first_false(flag, device, group) is None
