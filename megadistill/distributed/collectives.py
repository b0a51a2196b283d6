"""Collectives over a process group, which do nothing for a group of None (a single process).

Those of a run with replicas (`RunGroup`) go in two levels. No collective has more ranks than a replica, or than there
are replicas.

Legend: g ranks of the group, n rows.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill import timeline
from megadistill.distributed.groups.guard import Guard, ReplicasChanged

Value = TypeVar("Value")

# torch 2.11 has them under the names that torch 2.13 warns of.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""


@dataclass(frozen=True)
class RunGroup:
    """All ranks of R replicas, in the order of replicas; both levels have the same ranks in each of theirs.

    Small collectives go within each replica first; the first rank of each, its *leader*, then speaks across, and tells
    the others of its replica.
    """

    within: ProcessGroup | None
    """The ranks of this replica; None where it has one."""
    across: ProcessGroup
    """The ranks with this one's place in their replicas."""
    device: torch.device
    guard: Guard | None = None
    """Guard of replicas that may be lost; None: a lost one ends the run."""

    def finish(self, start: Callable[[], dist.Work | None]) -> bool:
        """Waits for a collective across, as `Guard.finish` does; without a guard its failure is raised."""
        if self.guard is not None:
            return self.guard.finish(start, on_cpu=self.device.type == "cpu")
        work = start()
        if work is not None:
            with timeline.span(timeline.WAIT, "wait for replicas"):
                work.wait()
        return True

    def led(self, out: Tensor, start: Callable[[], dist.Work | None]) -> Tensor:
        """`out` of a collective across, which the leaders `start` and the others receive.

        Raises:
            ReplicasChanged: on every rank of this replica, where another one is lost.
        """
        leads = group_rank(self.within) == 0
        is_whole = self.finish(start) if leads else True
        if self.within is not None:
            dist.broadcast(out.view(-1).view(torch.uint8), group=self.within, group_src=0)
        self.require(is_whole)
        return out

    def require(self, is_whole: bool) -> None:
        """Raises ReplicasChanged on every rank of this replica, where what one has from across is not whole."""
        if self.guard is not None and not all_true(is_whole, self.device, self.within):
            raise ReplicasChanged


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
        of_replica = all_gather_rows(rows, group.within).contiguous()
        gathered = rows.new_empty(group_size(group.across) * of_replica.shape[0], *of_replica.shape[1:])
        return group.led(gathered, lambda: _all_gather(gathered, of_replica, group=group.across, async_op=True))
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
    if isinstance(group, RunGroup):
        whole = _all_reduce(values, op, group.within).contiguous()
        group.led(whole, lambda: dist.all_reduce(whole, op=op, group=group.across, async_op=True))
        return values if whole is values else values.copy_(whole)
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
        _all_reduce(torch.zeros(1, device=group.device), dist.ReduceOp.MAX, group).item()
    elif group is not None:
        dist.barrier(group=group)


def all_gather_objects(own: Value, group: Group | None) -> list[Value]:
    """The object of every rank, which pickle can copy, in rank order."""
    if isinstance(group, RunGroup):
        return _gather_pickled(own, group)
    objects = [own] * group_size(group)
    if group is not None:
        dist.all_gather_object(objects, own, group=group)
    return objects


def broadcast_object(own: Value, group: Group | None, *, source: int = 0) -> Value:
    """The object of rank `source` of the group, which pickle can copy, on every rank."""
    if isinstance(group, RunGroup):
        return _broadcast_pickled(own, group, source=source)
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
        bytes_ = tensor.detach().view(-1).view(torch.uint8)
        if tensor.numel():
            group.led(bytes_, lambda: dist.broadcast(bytes_, group=group.across, group_src=0, async_op=True))
            if tensor.device.type != "cpu":
                torch.accelerator.synchronize(tensor.device)
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


def _gather_pickled(own: Value, group: RunGroup) -> list[Value]:
    """`all_gather_objects` by the two-level collectives of tensors."""
    content = _bytes(pickle.dumps(own)).to(group.device)
    sizes = all_gather_rows(torch.tensor([len(content)], device=group.device), group).tolist()
    padded = torch.nn.functional.pad(content, (0, max(sizes) - len(content)))
    rows = all_gather_rows(padded.unsqueeze(0), group).cpu()
    return [_unpickled(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def _broadcast_pickled(own: Value, group: RunGroup, *, source: int) -> Value:
    """`broadcast_object` by the two-level collectives of tensors: the others have zeros, which the source's exceed."""
    is_source = group_rank(group) == source
    content = _bytes(pickle.dumps(own) if is_source else bytes(1))
    size = int(all_reduce_max(torch.tensor(len(content), device=group.device), group).item())
    padded = torch.nn.functional.pad(content, (0, size - len(content))).to(group.device)
    received = all_reduce_max(padded, group)
    return own if is_source else cast(Value, _unpickled(received.cpu()))


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def add_across(flat: Tensor, group: Group | None) -> None:
    """Adds up `flat` over the ranks with the same place in their replicas, in place. Collective over a replica.

    Raises:
        ReplicasChanged: on every rank of this replica, where another one is lost.
    """
    if not isinstance(group, RunGroup):
        return
    # gloo may write to a tensor after its wait was given up, when a host that was frozen goes on.
    staged = flat.clone() if group.guard is not None and flat.device.type == "cpu" else flat
    is_whole = group.finish(lambda: dist.all_reduce(staged, group=group.across, async_op=True))
    group.require(is_whole)
    if staged is not flat:
        flat.copy_(staged)


def broadcast_across(tensors: Sequence[Tensor], group: RunGroup, *, source: int) -> None:
    """Copies the tensors of replica `source` into those of the others, each to the ranks with its place.

    Collective over all ranks. Raises ReplicasChanged on every rank of a replica where another one is lost.
    """
    is_whole = True
    for tensor in tensors:
        start = partial(dist.broadcast, tensor, group=group.across, group_src=source, async_op=True)
        is_whole = is_whole and group.finish(start)
    group.require(is_whole)


def _unpickled(content: Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())
