"""The training state of a ZeRO-3 student: this rank's partition of weights and optimizer state, saved and restored."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Module

from megadistill.config.recipe import OptimizerSection
from megadistill.distributed.collectives import RunGroup, broadcast_across
from megadistill.student.optimizer import MASTER, OPTIMIZERS, state_kinds

STEP_KEY = "optimizer_step"
"""Key of the number of steps that the optimizer has applied, for its bias correction."""

ReadRange = Callable[[str, int, int], Tensor]
"""(key, start, stop) -> elements start to stop of a flattened parameter's state, in float32."""


@dataclass(frozen=True)
class Partition:
    """This rank's piece of a flattened parameter: elements `start` to `stop` of `shape`, without ZeRO-3's padding."""

    name: str
    parameter: Any
    """The torch parameter, with the `ds_*` attributes that ZeRO-3 gives it."""
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def read(self, kind: str) -> Tensor:
        """[numel] float32: this rank's piece of the master weights or of an optimizer state."""
        if kind == MASTER:
            values: Tensor = safe_get_local_fp32_param(self.parameter)
        else:
            values = safe_get_local_optimizer_state(self.parameter, kind)
        return values[: self.numel].detach()


class StudentState:
    """Master weights and optimizer state of a student under ZeRO-3, on one of its ranks.

    `zero` is DeepSpeed's ZeRO-3 optimizer, which holds float32 partitions; it wraps `optimizer`, which updates them.
    """

    def __init__(
        self, model: Module, zero: Any, optimizer: torch.optim.Optimizer, section: OptimizerSection, *, rank: int
    ) -> None:
        self._model, self._zero, self._optimizer, self._section, self._rank = model, zero, optimizer, section, rank
        self._kinds = state_kinds(section)
        self.has_values = False
        """Whether `load` has given the parameters values."""
        self._reset()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name (Hugging Face's) -> shape of each parameter, the vocabulary padded; tied ones once."""
        return {partition.name: partition.shape for partition in self._partitions()}

    def local(self) -> dict[str, Tensor]:
        """This rank's partition, flattened: `master/NAME` and, for each state of the optimizer, `STATE/NAME`.

        Float32, without ZeRO-3's padding: the pieces of the ranks, one after the other, are the parameter.
        `optimizer_step` is the optimizer's count of applied steps. The tensors are ZeRO-3's own, on its device, and
        change with the next step: see `snapshot`.
        """
        state = {STEP_KEY: self._optimizer.state[self._zero.fp32_partitioned_groups_flat[0]]["step"].reshape(1)}
        for partition in self._partitions():
            state |= {f"{kind}/{partition.name}": partition.read(kind) for kind in self._kinds}
        return {key: value.detach() for key, value in state.items()}

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of `local` on the host."""
        return {key: value.to("cpu", copy=True) for key, value in self.local().items()}

    @torch.no_grad()
    def load(self, read: ReadRange) -> None:
        """Restores what `local` of any number of ranks returned: each piece is read by its range of elements."""
        self._reset()
        for partition in self._partitions():
            piece = partition.parameter.ds_tensor
            for kind in self._kinds:
                values = read(f"{kind}/{partition.name}", partition.start, partition.stop)
                values = torch.nn.functional.pad(values, (0, piece.numel() - partition.numel))
                if kind == MASTER:
                    safe_set_local_fp32_param(partition.parameter, values)
                    piece.copy_(values)
                else:
                    safe_set_local_optimizer_state(partition.parameter, values, kind)
        # after the pieces: a checkpoint has it in each rank's file, so no file is opened for it
        steps = read(STEP_KEY, 0, 1).reshape(())
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._optimizer.state[flat]["step"] = steps.to(flat.device, copy=True)
        self._refresh_copies()
        self.has_values = True

    @torch.no_grad()
    def receive(self, group: RunGroup, *, source: int) -> None:
        """Takes the state of replica `source`, whose ranks send theirs. Collective over all ranks.

        Raises:
            ReplicasChanged: a replica is lost; the state of those that receive is void.
        """
        if not self.has_values:
            self._reset()
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat
        kinds = [kind for kind in self._kinds if kind != MASTER]
        states = [self._optimizer.state[flat] for flat in flats]
        tensors = [flat.detach() for flat in flats] + [state[kind] for state in states for kind in (*kinds, "step")]
        broadcast_across(tensors, group, source=source)
        for master, compute in zip(flats, zero.fp16_partitioned_groups_flat, strict=True):
            if compute.data_ptr() != master.data_ptr():
                compute.copy_(master)
        self._refresh_copies()
        self.has_values = True

    def distributions(self) -> dict[str, Tensor]:
        """This rank's pieces, flat and float32, for histograms: `weights/NAME` and `gradient_mean/NAME`.

        A step frees its gradients; the optimizer's running mean of them remains.
        """
        mean = OPTIMIZERS[self._section.kind].gradient_mean
        return {
            f"{title}/{partition.name}": partition.read(kind)
            for partition in self._partitions()
            for title, kind in (("weights", MASTER), ("gradient_mean", mean))
            if kind is not None
        }

    def replicated(self) -> list[tuple[str, Tensor]]:
        """Name and value of each parameter that every rank holds whole: those too small for ZeRO-3 to gather anew.

        Between steps they are the same everywhere. None before the first forward pass.
        """
        return [
            (partition.name, partition.parameter.detach())
            for partition in self._partitions()
            if partition.parameter.ds_persist and partition.parameter.ds_status == ZeroParamStatus.AVAILABLE
        ]

    @torch.no_grad()
    def params_differing_from_master(self) -> list[str]:
        """Names of the parameters whose compute copy on this rank is not its float32 master, rounded.

        The copies are this rank's partition in the model's precision and, if the rank holds the parameter whole, that
        piece of the whole. For use between steps. One host-device sync, but for what is offloaded to the host.
        """
        whole = dict(self.replicated())
        differ: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for partition in self._partitions():
            piece = partition.parameter.ds_tensor[: partition.numel]
            rounded = partition.read(MASTER).to(piece.device, piece.dtype)
            copies = [piece]
            if partition.name in whole:
                copies.append(whole[partition.name].flatten()[partition.start : partition.stop].to(piece.device))
            differ[piece.device][partition.name] = torch.stack([_differ(copy, rounded) for copy in copies]).any()
        differing = []  # with `offload_param` small parameters are on the device, and the others on the host
        for by_name in differ.values():
            flags = torch.stack(list(by_name.values())).tolist()
            differing += [name for name, differs in zip(by_name, flags, strict=True) if differs]
        return differing

    def _reset(self) -> None:
        """Sets the optimizer state to zeros. It would make its own at its first step, which may be after a save."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{kind: torch.zeros_like(flat) for kind in self._kinds if kind != MASTER},
            }

    def _refresh_copies(self) -> None:
        """Updates the copies that ZeRO-3 holds beside the partitions.

        Small parameters stay gathered between steps, from the first forward pass on; hpZ keeps a second partition
        within each node, which is made anew from the first one when it is gone, and which releasing a parameter would
        fill with its former values.
        """
        gathered = [each for each in self._zero.persistent_parameters if each.ds_status == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(gathered)
        self._zero.invalidate_secondary_tensor()
        if gathered:
            gathered[0].all_gather(gathered)

    def _partitions(self) -> Iterator[Partition]:
        parameter: Any
        for name, parameter in self._model.named_parameters():
            numel = math.prod(parameter.ds_shape)
            size = parameter.ds_tensor.numel()
            start = min(self._rank * size, numel)
            yield Partition(name, parameter, tuple(parameter.ds_shape), start, min(start + size, numel))


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """[] bool: whether a byte differs. A NaN is itself."""
    return (a.view(torch.uint8) != b.view(torch.uint8)).any()
