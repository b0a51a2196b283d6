"""Sums of exponentials over the whole vocabulary, in float64 and over blocks of rows.

Legend: n tokens of a chunk, b of them in a block; v this rank's true rows of the vocabulary; z logits over the
temperature; m their maximum over the vocabulary.
"""

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import buffers


def row_blocks(z_nv: Tensor) -> list[slice]:
    """Ranges of rows whose float64 temporaries are small, and in a CPU's cache."""
    on_cpu = z_nv.device.type == "cpu"
    return buffers.row_blocks(z_nv, buffers.BLOCK_ELEMENTS if on_cpu else buffers.ACCELERATOR_BLOCK_ELEMENTS)


def vocabulary_maximum(z_nv: Tensor, vocab: VocabSlice) -> Tensor:
    """[n] float64: m; a finite number where every logit is -inf. One small all-gather."""
    n, v = z_nv.shape
    own_n = z_nv.amax(dim=1) if v > 0 else z_nv.new_full((n,), float("-inf"))
    maximum_n = all_gather_rows(own_n, vocab.group).view(-1, n).amax(dim=0)
    return maximum_n.clamp_min(torch.finfo(z_nv.dtype).min).double()


def exponential_sum(z_nv: Tensor, maximum_n: Tensor) -> Tensor:
    """[n] float64: this slice's Σ e^(z - m)."""
    return torch.cat([exponentials(z_nv[block], maximum_n[block]).sum(dim=1) for block in row_blocks(z_nv)])


def exponentials(z_bv: Tensor, maximum_b: Tensor) -> Tensor:
    """[b, v] float64: e^(z - m)."""
    return (z_bv - maximum_b.unsqueeze(1)).exp_()
