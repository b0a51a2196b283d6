"""Collectives over a process group; a group of None (one process) is a no-op, so no caller asks.

Legend: g ranks of the group, n rows.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill import timeline

WAITS_FOR_RANKS = True
"""The hang detector takes a frame of this module for a wait."""


def group_size(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class Pending:
    """A collective under way. Its source must stay as it is until `wait` returns."""

    result: Tensor
    source: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The result, which the device's later work may read."""
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
    return Pending(gathered, source, dist.all_gather_single(gathered, source, group=group, async_op=True))


def start_reduce_scatter_rows(rows: Tensor, group: ProcessGroup | None) -> Pending:
    """[g·n, ...] of every rank -> [n, ...]: this rank's block of the sum over ranks."""
    if group is None:
        return Pending(rows, rows, None)
    source = rows.contiguous()
    block = rows.new_empty(rows.shape[0] // group_size(group), *rows.shape[1:])
    return Pending(block, source, dist.reduce_scatter_single(block, source, group=group, async_op=True))


def all_gather_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """`start_all_gather_rows`, waited for."""
    return start_all_gather_rows(rows, group).wait()


def reduce_scatter_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """`start_reduce_scatter_rows`, waited for."""
    return start_reduce_scatter_rows(rows, group).wait()


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def scatter_rows(rows: Tensor | None, out: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
    """Rank `source` of the group gives block i of `rows` [g·n, ...] to rank i, which finds it in `out` [n, ...]."""
    if group is None:
        assert rows is not None
        return rows
    blocks = list(rows.contiguous().chunk(group_size(group))) if rows is not None else None
    dist.scatter(out, blocks, group=group, group_src=source)
    return out


def barrier(group: ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group=group)


def everywhere(flag: bool, device: torch.device, group: ProcessGroup | None) -> bool:
    """True where the flag is true on every rank. A host-device sync."""
    if group is None:
        return flag
    value = torch.tensor(int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN, group=group)
    return bool(value.item())
