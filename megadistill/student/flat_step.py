"""ZeRO-3's optimizer step on flat partitions: as many operators for a thousand parameters as for one.

A rank's partitions of a decay group's parameters lie one after the other in flat tensors: gradients, master weights,
the copy that the model computes with. DeepSpeed's own `step` (0.19.0 to 0.19.8) does not use that: it casts the
gradient of each parameter to float64 and reduces it, copies all gradients into new memory, clips by 1 where nothing is
clipped, copies float32 weights onto themselves, points each partition to where it points already, and gathers each
small parameter by a collective of its own. That of 0.19.0 also takes a step whose gradients are not finite. So this one
replaces it; what holds, gathers and offloads the tensors is DeepSpeed's.

With replicas of the student, each of which is a ZeRO-3 world, a step begins with one all-reduce of the flat gradient
over the ranks that hold the same shard, in float32. From there on replicas compute the same, to the bit.
"""

import math
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from megadistill.distributed.collectives import add_across, all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.student.norms import ACCELERATOR_PIECE, CPU_PIECE, StepNorms
from megadistill.student.persistent import gather_together

REQUIRED = (
    "averaged_gradients",
    "clip_grad",
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "loss_scale",
    "offload_optimizer",
    "persistent_parameters",
    "_optimizer_step",
    "_overflow_clean_up",
    "_partition_all_parameters",
    "_post_step",
    "_pre_step",
)
"""Members of DeepSpeed's optimizer that `FlatStep` reads or calls."""


class FlatStep:
    """The `step` of one ZeRO-3 optimizer of DeepSpeed, `zero`, whose tensors are in memory.

    A step whose gradient norm is not finite changes nothing, on any rank.

    Raises:
        UserError: DeepSpeed's optimizer is not laid out as those of the versions that this package knows.
    """

    def __init__(self, zero: Any, topology: Topology) -> None:
        _require_layout(zero)
        self._zero, self._topology = zero, topology
        flat = zero.grad_partitions_flat_buffer
        self._gradients = flat.split([master.numel() for master in zero.fp32_partitioned_groups_flat])
        """The gradient of each group. With an offloaded optimizer its step reads copies on the host instead."""
        self._pieces = flat.split(CPU_PIECE if flat.device.type == "cpu" else ACCELERATOR_PIECE)
        self.norms: StepNorms | None = None
        """Takes norms on the steps for which they are requested; None: never."""

    @classmethod
    def install(cls, zero: Any, topology: Topology) -> "FlatStep | None":
        """Has DeepSpeed's engine call this step, unless states or weights are on NVMe: their tensors come and go.

        None where it does not.

        Raises:
            UserError: see the class.
        """
        if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
            return None
        flat_step = cls(zero, topology)
        zero.step = flat_step.step
        return flat_step

    @torch.no_grad()
    def step(self) -> None:
        """Adds the gradients of the replicas, clips by the global norm, and updates master weights, optimizer state and
        compute copies. Collective.

        All ranks of a replica update, or none: they agree that each has the sum of all replicas, which raises
        `ReplicasChanged` where one is lost.

        One host-device sync: the norm.
        """
        zero = self._zero
        zero._pre_step()
        zero._partition_all_parameters()
        add_across(zero.grad_partitions_flat_buffer, self._topology.world_group)
        norm = self._global_norm()
        zero.overflow = not math.isfinite(norm)
        zero._global_grad_norm = math.inf if zero.overflow else norm
        if zero.overflow:
            zero._overflow_clean_up(zero.loss_scale)
            if self.norms is not None:
                self.norms.end_step()
            return
        scale = min(1.0, 1.0 / ((norm + 1e-6) / zero.clip_grad)) if zero.clip_grad > 0 else 1.0
        norms = self.norms if self.norms is not None and self.norms.is_requested else None
        for index in range(len(self._gradients)):
            self._update(index, scale, norms)
        if norms is not None:
            norms.end_step()
        zero.averaged_gradients = {}
        self._end()

    def begin_again(self, topology: Topology) -> None:
        """Drops what was accumulated since the last step. `topology`: of the next ones."""
        zero, self._topology = self._zero, topology
        zero._pre_step()  # its count of micro-batches begins again
        zero.averaged_gradients = {}
        zero.grad_partitions_flat_buffer.zero_()
        if self.norms is not None:
            self.norms.end_step()

    def _end(self) -> None:
        """DeepSpeed's end of a step, but for its gathering of persistent parameters one by one."""
        zero, persistent = self._zero, self._zero.persistent_parameters
        zero.persistent_parameters = []
        zero._post_step(set())
        zero.persistent_parameters = persistent
        if persistent:
            gather_together(persistent, self._topology)

    def _update(self, index: int, scale: float, norms: StepNorms | None) -> None:
        """Steps one group: the optimizer, then the rounding of the masters to the model's precision.

        `norms`: takes the group's norms; None: there are none of this step.
        """
        zero = self._zero
        master, compute = zero.fp32_partitioned_groups_flat[index], zero.fp16_partitioned_groups_flat[index]
        if not zero.offload_optimizer:
            master.grad = self._gradients[index]
        if norms is not None:
            norms.before_update(index, master.grad, master)
        if scale < 1.0:
            master.grad.mul_(scale)
        zero._optimizer_step(index)
        if norms is not None:
            norms.after_update(index, master)
        if not zero.offload_optimizer:
            master.grad = None
        if compute.data_ptr() != master.data_ptr():
            compute.copy_(master)

    def _global_norm(self) -> float:
        """The norm of the gradient, whose shards the ranks of a replica have, summed in float64; not finite if one of
        them is not."""
        if self._zero.offload_optimizer:  # DeepSpeed computes those norms on the device, before a gradient leaves it
            norms = torch.stack(list(self._zero.norm_for_param_grads.values())).double()
        else:
            norms = torch.stack(torch._foreach_norm(self._pieces, 2, dtype=torch.float64))
        return math.sqrt(all_reduce_sum(norms.square().sum(), self._topology.shard_group).item())


def gradient_partition(parameter: Any) -> Tensor | None:
    """This rank's flat float32 piece of a ZeRO-3 parameter's gradient, in the memory that `FlatStep` reads.

    None where the optimizer is on the host, which reads copies.
    """
    if parameter._z3_optimizer.offload_optimizer:
        return None
    partition: Tensor = safe_get_local_grad(parameter)
    return partition


def _require_layout(zero: Any) -> None:
    missing = [name for name in REQUIRED if not hasattr(zero, name)]
    if missing:
        raise _unknown(f"its ZeRO-3 optimizer has no {', '.join(missing)}")
    if zero.loss_scale != 1.0:
        raise _unknown(f"its loss scale is {zero.loss_scale:g}, not 1")
    for pieces, compute in zip(zero.fp16_partitioned_groups, zero.fp16_partitioned_groups_flat, strict=True):
        if not _consecutive(pieces, compute):
            raise _unknown("its partitions of weights are not pieces of flat tensors")
    if not zero.offload_optimizer:
        gradients = [gradient_partition(parameter) for group in zero.fp16_groups for parameter in group]
        if not _consecutive(gradients, zero.grad_partitions_flat_buffer):
            raise _unknown("its partitions of gradients are not pieces of a flat tensor")


def _consecutive(pieces: list[Any], flat: Tensor) -> bool:
    """Whether the pieces lie in `flat` one after the other, and are all of it."""
    stops = list(accumulate(piece.numel() for piece in pieces))
    starts = [flat.data_ptr() + flat.itemsize * start for start in (0, *stops)]
    return stops[-1] == flat.numel() and all(
        piece.dtype == flat.dtype and piece.data_ptr() == start
        for piece, start in zip(pieces, starts, strict=False)
        if piece.numel() > 0
    )


def _unknown(reason: str) -> UserError:
    return UserError(
        f"deepspeed {version('deepspeed')} is not laid out as this package knows it: {reason}; install a version of "
        "docs/environment.md"
    )
