"""Norms of the student's gradient, update and weights, by layer and by kind of module, of one optimizer step.

They are taken in `FlatStep`, while each flat partition is there anyway: squares are summed in float64 for each
parameter, and those of all ranks are added by one small all-reduce, so a norm is that of the whole tensor. On such a
step the optimizer's largest partition is copied, since an update is what the weights are afterwards minus before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.types import NORM_KINDS

GRADIENT, UPDATE, WEIGHT = range(3)
"""Rows of the sums, in the order of `NORM_KINDS`."""

TOTAL = "total"
"""Group of all parameters."""

CPU_PIECE, ACCELERATOR_PIECE = 1 << 15, 1 << 24
"""Maximum elements of a piece whose norm is taken at once: a CPU widens it to float64 in memory."""


def groups_of(name: str) -> tuple[str, ...]:
    """The groups of a parameter: `total`; its layer (`layers.3`) and the module in it (`self_attn`), or its module.

    `model.layers.3.self_attn.q_proj.weight` is in `total`, `layers.3` and `self_attn`; `lm_head.weight` in `lm_head`.
    """
    parts = name.removeprefix("model.").split(".")
    if parts[0] == "layers" and len(parts) > 2:
        return TOTAL, f"layers.{parts[1]}", parts[2]
    return TOTAL, parts[0]


@dataclass(frozen=True)
class _Pieces:
    """The parameters of one flat partition, cut into pieces that a reduction takes at once."""

    parameters: Tensor
    """[pieces] int64, on the partition's device: number of the parameter that each piece is of."""
    bounds: tuple[tuple[int, int], ...]
    """First element of each piece in the partition, and the one behind it. ZeRO-3's padding is in none."""

    def squares(self, flat: Tensor, parameters: int) -> Tensor:
        """[parameters] float64: each parameter's sum of squares in the partition `flat`. No host-device sync."""
        sums = torch.zeros(parameters, dtype=torch.float64, device=flat.device)
        if not self.bounds:
            return sums
        norms = torch._foreach_norm([flat[start:stop] for start, stop in self.bounds], 2, dtype=torch.float64)
        return sums.index_add_(0, self.parameters, torch.stack(norms).square())


class StepNorms:
    """Norms of the steps for which they are requested. All ranks request the same steps."""

    def __init__(self, zero: Any, names: dict[int, str], topology: Topology, *, rank: int) -> None:
        """
        Args:
            zero: DeepSpeed's ZeRO-3 optimizer.
            names: `id` of each parameter -> its name.
            rank: of the ZeRO-3 partition.
        """
        self._names, self._topology = tuple(names.values()), topology
        number = {each: index for index, each in enumerate(names)}
        self._pieces = []
        for parameters, partitions, master in zip(
            zero.fp16_groups, zero.fp16_partitioned_groups, zero.fp32_partitioned_groups_flat, strict=True
        ):
            sizes = [partition.numel() for partition in partitions]
            starts = (0, *accumulate(sizes))
            valid = [
                max(0, min(size, math.prod(parameter.ds_shape) - rank * size))
                for parameter, size in zip(parameters, sizes, strict=True)
            ]
            owners = [number[id(parameter)] for parameter in parameters]
            self._pieces.append(_cut(owners, starts, valid, master.device))
        self._squares: list[tuple[int, Tensor]] = []
        self._before: Tensor | None = None
        self.is_requested = False
        """Whether the next step takes norms."""

    def request(self) -> None:
        """Has the next optimizer step take the norms. They replace those of an earlier one."""
        self.is_requested, self._squares = True, []

    def end_step(self) -> None:
        self.is_requested = False

    def before_update(self, partition: int, gradient: Tensor, master: Tensor) -> None:
        """Takes the gradient's norms, before it is clipped, and copies the weights."""
        self._add(GRADIENT, partition, gradient)
        self._before = master.detach().clone()

    def after_update(self, partition: int, master: Tensor) -> None:
        """Takes the norms of update and weights."""
        assert self._before is not None, "the weights before the update were not copied"
        self._add(WEIGHT, partition, master)
        self._add(UPDATE, partition, self._before.sub_(master))
        self._before = None

    def _add(self, kind: int, partition: int, flat: Tensor) -> None:
        squares = self._pieces[partition].squares(flat.detach(), len(self._names))
        self._squares.append((kind, squares.to(self._topology.device)))

    def reduced(self) -> dict[str, dict[str, float]] | None:
        """Kind -> group -> norm of the last step with norms, which are those of the whole model on every rank.

        Collective: one all-reduce of three numbers a parameter, and the one host-device sync. None where no step has
        taken norms since the last request.
        """
        if not self._squares:
            return None
        sums = torch.zeros(len(NORM_KINDS), len(self._names), dtype=torch.float64, device=self._topology.device)
        for kind, squares in self._squares:
            sums[kind] += squares
        self._squares = []
        rows = all_reduce_sum(sums, self._topology.shard_group).tolist()
        return {kind: _by_group(self._names, row) for kind, row in zip(NORM_KINDS, rows, strict=True)}


def _by_group(names: Sequence[str], squares: Sequence[float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, square in zip(names, squares, strict=True):
        for group in groups_of(name):
            sums[group] = sums.get(group, 0.0) + square
    return {group: math.sqrt(total) for group, total in sums.items()}


def _cut(owners: Sequence[int], starts: Sequence[int], valid: Sequence[int], device: torch.device) -> _Pieces:
    limit = CPU_PIECE if device.type == "cpu" else ACCELERATOR_PIECE
    parameters, bounds = [], []
    for owner, start, size in zip(owners, starts, valid, strict=False):
        for offset in range(0, size, limit):
            parameters.append(owner)
            bounds.append((start + offset, start + min(offset + limit, size)))
    return _Pieces(torch.tensor(parameters, dtype=torch.int64, device=device), tuple(bounds))
