"""The student's LM head: each rank computes on the rows of its ZeRO-3 partition.

ZeRO-3 stores a [V, D] parameter as w flat contiguous pieces; with V % w == 0 piece r is exactly rows
[r·V/w, (r+1)·V/w). Those rows are this rank's vocab slice, so the head is never gathered over the world, and the loss
adds its gradient where the optimizer step reads it: no copy, no cast, no second matrix for an accumulation window.

Legend: V padded vocabulary, D width, w ranks of a replica, p ranks of a vocab group, v = V/p rows of this rank's slice.
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
from megadistill.student.flat_step import gradient_partition
from megadistill.types import WeightGradient


class StudentHead:
    """The rows of the head on which this rank computes; their gradient is ZeRO-3's.

    `parameter` is ZeRO-3's [V, D] parameter: lm_head.weight, or the embedding of a model with tied embeddings (`tied`).
    `vocab_size` is the true vocabulary; V is padded.
    """

    def __init__(self, parameter: Any, *, vocab_size: int, tied: bool, topology: Topology) -> None:
        padded, self._width = parameter.ds_shape
        ranges = block_cyclic_ranges(padded, topology.shard_world, topology.group_size, topology.shard_rank)
        self.vocab = VocabSlice(ranges=ranges, size=vocab_size, group=topology.vocab_group)
        self._parameter = parameter
        self._tied = tied
        self._topology = topology
        self._weight: Tensor | None = None
        self._gradient: WeightGradient | None = None
        self._partition = gradient_partition(parameter)
        assert parameter.ds_tensor.numel() == padded // topology.shard_world * self._width, (
            "the partition is not whole rows"
        )

    def weight(self) -> Tensor:
        """[v, D] in the model's precision; its gradient goes to `gradient()`.

        The same tensor until `flush_gradient`: weights do not change within an accumulation window. It is read again
        after each step, because the partition is a view into the optimizer's flat buffer.
        """
        if self._weight is None:
            rows = self._parameter.ds_tensor.detach().view(-1, self._width).to(self._topology.device)
            self._weight = all_gather_rows(rows, self._topology.slice_group)
        return self._weight

    def gradient(self) -> WeightGradient:
        """[v, D] float32: where the losses of this window add their gradients with respect to `weight()`.

        It is ZeRO-3's partition where that has no other rows and no other gradient: not with tied embeddings, whose
        lookup has one, not with p < w, and not with an optimizer on the host.
        """
        if self._gradient is None:
            if self._partition is not None and not self._tied and self._topology.slice_group is None:
                memory = self._partition.view(-1, self._width)
            else:
                memory = torch.empty(self.vocab.rows, self._width, dtype=torch.float32, device=self._topology.device)
            self._gradient = WeightGradient(memory)
        return self._gradient

    def drop_gradient(self) -> None:
        """Ends the window without a step: its gradient is lost."""
        self._gradient, self._weight = None, None

    @torch.no_grad()
    def flush_gradient(self) -> None:
        """Ends the window: its gradient is in ZeRO-3's partition, for its norm, clipping and optimizer step.

        Call it after the last backward of the window and before the optimizer step. With tied embeddings ZeRO-3 has
        already reduced the gradient of the lookup, and that of the head is added.
        """
        gradient, self._gradient, self._weight = self._gradient, None, None
        assert gradient is not None, "the head was not used in this window"
        assert not gradient.empty, "no loss of this window had a gradient for the head"
        memory, partition, ranks = gradient.memory, self._partition, self._topology.slice_group
        if partition is None:
            block = reduce_scatter_rows(memory, ranks).flatten()
            safe_set_local_grad(
                self._parameter, block.add_(safe_get_local_grad(self._parameter)) if self._tied else block
            )
        elif self._tied:
            partition += reduce_scatter_rows(memory, ranks).flatten()
        elif ranks is not None:
            reduce_scatter_rows(memory, ranks, out=partition.view(-1, self._width))
