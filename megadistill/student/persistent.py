"""Parameters that every rank holds whole between steps: ZeRO-3's persistent ones, gathered by one collective.

They are those of at most `stage3_param_persistence_threshold` elements. DeepSpeed gathers each of them by an all-gather
of its own after a step, and waits for it: a hundred of some kilobytes for a student of 26 layers. NCCL has only rings
for an all-gather, whose latency grows with the ranks; for an all-reduce it has trees, whose latency grows with their
logarithm. So here all of them are gathered together, by an all-reduce in which each rank has zeros for the others'.
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch.nn import Module

from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology


def keep_gathered(zero: Any, module: Module) -> None:
    """Has DeepSpeed's ZeRO-3 optimizer `zero` treat a module's parameters as persistent, whatever their size."""
    parameter: Any
    for parameter in module.parameters():
        if not parameter.ds_persist:
            parameter.ds_persist = True
            zero.persistent_parameters.append(parameter)


@torch.no_grad()
def gather_together(parameters: Sequence[Any], topology: Topology) -> None:
    """Gathers released parameters of one dtype, the same on every rank, in one all-reduce of bytes. Collective.

    Sums of bytes of which all but one are zero are exact, the sign of a zero included.
    """
    pieces = [parameter.ds_tensor for parameter in parameters]
    spans = [topology.shard_world * piece.numel() for piece in pieces]
    whole = torch.zeros(sum(spans), dtype=pieces[0].dtype, device=topology.device)
    parts = torch.split(whole, spans)
    own = [part.view(topology.shard_world, -1)[topology.shard_rank] for part in parts]
    torch._foreach_copy_(own, pieces)
    all_reduce_sum(whole.view(torch.uint8), topology.shard_group)
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
