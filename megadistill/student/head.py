"""The student's LM head: each rank computes on the rows of its ZeRO-3 partition.

ZeRO-3 stores a [V, D] parameter as w flat contiguous pieces; with V % w == 0 piece r is exactly rows
[r·V/w, (r+1)·V/w). Those rows are this rank's vocab slice, so the head is never gathered over the world.

Legend: V padded vocabulary, D width, w world size, p ranks of a vocab group, v = V/p rows of this rank's slice.
A rank of a group with p < w computes on w/p pieces (block-cyclic, see `distributed.vocab`): one all-gather and one
reduce-scatter an optimizer step over the ranks with the same rank in their groups, none when p = w.
"""

from typing import Any

import torch
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, reduce_scatter_rows
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice, block_cyclic_ranges


class StudentHead:
    """The rows of the head on which this rank computes; their gradient is returned to ZeRO-3.

    `parameter` is ZeRO-3's [V, D] parameter: lm_head.weight, or the embedding of a model with tied embeddings (`tied`).
    `vocab_size` is the true vocabulary; V is padded.
    """

    def __init__(self, parameter: Any, *, vocab_size: int, tied: bool, topology: Topology) -> None:
        padded, self._width = parameter.ds_shape
        ranges = block_cyclic_ranges(padded, topology.world, topology.group_size, topology.rank)
        self.vocab = VocabSlice(ranges=ranges, size=vocab_size, group=topology.vocab_group)
        self._parameter = parameter
        self._tied = tied
        self._topology = topology
        self._leaf: Tensor | None = None
        assert parameter.ds_tensor.numel() == padded // topology.world * self._width, "the partition is not whole rows"

    def weight(self) -> Tensor:
        """[v, D]: an autograd leaf in the model's precision whose `.grad` accumulates in float32.

        The same leaf until `flush_gradient`: weights do not change within an accumulation window. It is read again
        after each step, because the partition is a view into the optimizer's flat buffer.
        """
        if self._leaf is None:
            rows = self._parameter.ds_tensor.detach().view(-1, self._width).to(self._topology.device)
            self._leaf = all_gather_rows(rows, self._topology.slice_group).requires_grad_()
            self._leaf.grad_dtype = torch.float32
        return self._leaf

    @torch.no_grad()
    def flush_gradient(self, loss_scale: float) -> None:
        """Writes the window's gradient into ZeRO-3's partition, for its norm, clipping and optimizer step.

        Call it after the last backward of the window and before the optimizer step. The gradient is that of the loss
        times `loss_scale`, which is divided out here. With tied embeddings, ZeRO-3 has already reduced the gradient of
        the lookup, and that of the head is added.
        """
        leaf, self._leaf = self._leaf, None
        assert leaf is not None, "the head was not used in this window"
        assert leaf.grad is not None, "no backward reached the head in this window"
        gradient = reduce_scatter_rows(leaf.grad, self._topology.slice_group).div_(loss_scale).flatten()
        if self._tied:
            gradient += safe_get_local_grad(self._parameter)
        safe_set_local_grad(self._parameter, gradient)
