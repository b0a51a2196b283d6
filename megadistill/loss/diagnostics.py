"""`Diagnostics` of teacher and student, accumulated chunk by chunk.

Legend: g ranks of the vocab group, L tokens of the rank that has most.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_reduce_sum, group_rank
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.chunk import PAIRWISE_TERMS, Chunk
from megadistill.types import DECILES, TOP_K, Diagnostics


@dataclass(frozen=True)
class DiagnosticsAccumulator:
    """Terms of the tokens of all chunks so far."""

    pairwise_gL4: Tensor
    """This slice's shares of `pointwise.pairwise_terms`."""
    entropy_gL: Tensor
    """The teacher's, in nats."""
    top_k_mass: Tensor
    """[3]: summed over this rank's tokens, weighted."""

    @classmethod
    def zeros(cls, like_gL: Tensor) -> "DiagnosticsAccumulator":
        """An accumulator for tokens [g, L], in the dtype of `like_gL`."""
        return cls(
            like_gL.new_zeros(*like_gL.shape, PAIRWISE_TERMS), torch.zeros_like(like_gL), like_gL.new_zeros(len(TOP_K))
        )

    def add(self, chunk: Chunk, span: slice, own: slice) -> None:
        """Reads the logits of a chunk, before dlogits overwrites them. Collective."""
        assert chunk.teacher is not None
        g = len(self.entropy_gL)
        self.pairwise_gL4[:, span] = chunk.pairwise_terms().view(g, -1, PAIRWISE_TERMS)
        self.entropy_gL[:, span] = chunk.teacher.entropy_n.view(g, -1)
        self.top_k_mass.add_(chunk.tokens.weights_n[own] @ chunk.top_k_mass()[own])

    def sums(self, weights_gL: Tensor, vocab: VocabSlice) -> Tensor:
        """[16]: the fields of `Diagnostics`, one after the other, of this rank's tokens. Collective."""
        group, rank = vocab.group, group_rank(vocab.group)
        pairwise_L4 = all_reduce_sum(self.pairwise_gL4, group)[rank]
        weights_L1 = weights_gL[rank].unsqueeze(1)  # reverse KL may be infinite, and 0 times that is no number
        kl, *others = torch.where(weights_L1 == 0, 0, weights_L1 * pairwise_L4).unbind(dim=1)
        reverse, jsd, acceptance = (other.sum() for other in others)
        live_gL = weights_gL != 0
        place_L = ascending_places(torch.where(live_gL, self.entropy_gL, math.inf))[rank]
        decile_L = (place_L * DECILES // live_gL.sum().clamp_min(1)).clamp_max(DECILES - 1)
        deciles = kl.new_zeros(DECILES).index_add_(0, decile_L, kl)
        return torch.cat([torch.stack([acceptance, reverse, jsd]), self.top_k_mass, deciles])


def unpacked(sums: Tensor) -> Diagnostics:
    """`DiagnosticsAccumulator.sums` by name."""
    acceptance, reverse_kl, jsd = sums[:3].unbind()
    return Diagnostics(acceptance, reverse_kl, jsd, sums[3 : 3 + len(TOP_K)], sums[3 + len(TOP_K) :])


def ascending_places(values: Tensor) -> Tensor:
    """Each value's place in ascending order among all of them, from 0; of equals, the first comes first."""
    order = values.flatten().argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(values.shape)
