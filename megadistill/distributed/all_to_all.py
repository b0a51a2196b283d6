"""All-to-all of equal blocks over a process group, as an operator that autograd and torch.compile take.

Legend: n ranks of the group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megadistill import timeline

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

# Not named as the operators of attention are, whose outputs selective checkpointing keeps (`models.layers`).
OPERATOR = "megadistill_distributed::all_to_all"

_groups: dict[str, ProcessGroup] = {}


class AllToAll:
    """The exchange of a group. Its ranks call it in the same order, with blocks of the same shape."""

    def __init__(self, group: ProcessGroup) -> None:
        self.name = str(group.group_name)
        _groups[self.name] = group  # an operator takes no group

    def __call__(self, blocks: Tensor) -> Tensor:
        """[n, ...]: block i goes to rank i -> [n, ...]: block i is from rank i. Its own gradient's exchange, too."""
        exchanged: Tensor = exchange_blocks(blocks, self.name)
        return exchanged


def _exchange(blocks: Tensor, group: str) -> Tensor:
    source = blocks.contiguous()
    received = torch.empty_like(source)
    with timeline.span(timeline.WAIT, "exchange heads and tokens"):
        dist.all_to_all_single(_bytes(received), _bytes(source), group=_groups[group])
    return received


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory, which gloo sends whatever its type is."""
    return tensor.view(-1).view(torch.uint8)


exchange_blocks = torch.library.custom_op(OPERATOR, _exchange, mutates_args=())


@exchange_blocks.register_fake
def _(blocks: Tensor, group: str) -> Tensor:
    return torch.empty_like(blocks, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """A block that went to rank i has its gradient there, as the block for this rank."""
    return exchange_blocks(gradient, ctx.group), None


exchange_blocks.register_autograd(_backward, setup_context=_save)
