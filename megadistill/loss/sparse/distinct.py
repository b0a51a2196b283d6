"""Selection of k distinct ids by sampling without replacement, over slices of the vocabulary.

The Gumbel-top-k trick (arXiv:1903.06059): the k largest of z + Gumbel noise, with independent noise of each id, are
k draws without replacement from softmax(z). The noise of an id is a hash of its token's random number and the id, so
each rank makes that of its own rows, and that of the others' candidates, without a message.

Legend: n tokens of a chunk (of the whole group), b of them in a block; v this rank's true rows of the vocabulary; W
candidate ids of a token; K ids of a token; z logits over the temperature.
"""

import math
from typing import Final

import torch
from torch import Tensor

from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.sparse.exponentials import row_blocks
from megadistill.loss.sparse.most_likely import gather_candidates
from megadistill.loss.sparse.selection import SampledDistinct, SelectedIds

# Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit numbers, which wrap around.
_GAMMA: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND: Final = 0x94D049BB133111EB - (1 << 64)


def draw_distinct(
    z_nv: Tensor, uniforms_n1: Tensor, selection: SampledDistinct, max_rows: int, vocab: VocabSlice
) -> SelectedIds:
    """The targets of the tokens of a chunk, on every rank; `max_rows` is the largest v of a rank. Collective."""
    limit = min(selection.k, vocab.size)
    width = min(limit, max_rows)
    keys_n = keys(uniforms_n1)
    ids_v = vocab.global_ids(z_nv.device)[: z_nv.shape[1]]
    rows = []
    for block in row_blocks(z_nv):
        perturbed_bv = gumbel_noise(keys_n[block], ids_v).add_(z_nv[block])
        rows.append(perturbed_bv.topk(min(width, len(ids_v)), dim=1).indices)
    z_nW, ids_nW = gather_candidates(z_nv, torch.cat(rows), width, vocab)
    chosen_nK = (gumbel_noise(keys_n, ids_nW) + z_nW).topk(min(limit, ids_nW.shape[1]), dim=1).indices
    z_nK, ids_nK = z_nW.gather(1, chosen_nK).double(), ids_nW.gather(1, chosen_nK)
    ids_nK = torch.where(z_nK > -math.inf, ids_nK, vocab.size)
    ids_nK, order_nK = ids_nK.sort(dim=1)
    probs_nK = z_nK.gather(1, order_nK).softmax(dim=1)
    no_tail_n = torch.full_like(probs_nK[:, 0], -math.inf)
    return SelectedIds(ids_nK.masked_fill(ids_nK == vocab.size, -1), probs_nK, no_tail_n)


def keys(uniforms_n1: Tensor) -> Tensor:
    """[n] int64: the start of each token's sequence of hashes, of all 53 bits of its random number."""
    return _mix((uniforms_n1.squeeze(1) * 2.0**53).long())


def gumbel_noise(keys_n: Tensor, ids: Tensor) -> Tensor:
    """[n, W] float64: the noise of the ids [W], or [n, W], of each token; from -3.6 to 36.8.

    The hashes are the numbers of SplitMix64 from the token's key on, in the order of ids.
    """
    return gumbel_of(_mix(keys_n.unsqueeze(1) + (ids + 1) * _GAMMA))


def gumbel_of(hashes: Tensor) -> Tensor:
    """float64: Gumbel noise of 64-bit hashes; -log(-log u), of a u that is exact and neither 0 nor 1."""
    return _shift(hashes, 12).double().add_(0.5).mul_(2.0**-52).log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64: a bijection of 64 bits, each of which depends on all."""
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right that moves in zeros, where torch's moves in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
