"""Selection of the most likely ids: top-k, top-p, and all above a threshold.

Legend: n tokens of a chunk (of the whole group), b of them in a block; v this rank's true rows of the vocabulary; g
ranks of the vocab group; W candidate ids of a token; z logits over the temperature.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.sparse.exponentials import exponential_sum, row_blocks, vocabulary_maximum
from megadistill.loss.sparse.selection import SelectedIds, Threshold, TopK, TopP
from megadistill.types import Tail


def select_most_likely(
    z_nv: Tensor, maximum_n: Tensor, selection: TopK | Threshold | TopP, tail: Tail, max_rows: int, vocab: VocabSlice
) -> SelectedIds:
    """The targets of the tokens of a chunk, on every rank. Collective.

    `max_rows` is the largest v of a rank. The logits of the selected ids are overwritten where the tail has a mass.
    """
    sum_n = all_reduce_sum(exponential_sum(z_nv, maximum_n), vocab.group)
    if isinstance(selection, Threshold):
        lowest_n1 = (maximum_n + (selection.epsilon * sum_n).log()).unsqueeze(1)
        width = _largest_count(z_nv, lowest_n1, vocab)
        limit = vocab.size
    else:
        limit = min(selection.k if isinstance(selection, TopK) else selection.max_ids, vocab.size)
        width = min(limit, max_rows)
    z_nW, ids_nW = _candidates(z_nv, width, vocab)
    z_nW, ids_nW = z_nW[:, :limit].double(), ids_nW[:, :limit]
    p_nW = (z_nW - maximum_n.unsqueeze(1)).exp() / sum_n.unsqueeze(1)

    selected_nW = z_nW > -math.inf
    if isinstance(selection, TopP):
        selected_nW &= pad(p_nW.cumsum(dim=1)[:, :-1], (1, 0)) < selection.p
    elif isinstance(selection, Threshold):
        above_nW = z_nW >= lowest_n1
        above_nW[:, 0] |= tail is Tail.RENORMALISED
        selected_nW &= above_nW
    ids_nW = torch.where(selected_nW, ids_nW, -1)
    if tail is Tail.RENORMALISED:
        probs_nW = torch.where(selected_nW, z_nW, -math.inf).softmax(dim=1)
        return SelectedIds(ids_nW, probs_nW, torch.full_like(sum_n, -math.inf))
    log_tail_n = _log_outside(z_nv, ids_nW, vocab) - maximum_n - sum_n.log()
    return SelectedIds(ids_nW, torch.where(selected_nW, p_nW, 0), log_tail_n)


def _candidates(z_nv: Tensor, width: int, vocab: VocabSlice) -> tuple[Tensor, Tensor]:
    """[n, g·width] logits and ids of every slice's `width` most likely ids, in order; of equals the lowest id first.

    Where slices have fewer, the logits at the end are -inf. One all-gather.
    """
    rows_nW = torch.cat([_top_rows(z_nv[block], min(width, z_nv.shape[1])) for block in row_blocks(z_nv)])
    z_nW, ids_nW = gather_candidates(z_nv, rows_nW, width, vocab)
    by_id_nW = ids_nW.argsort(dim=1)
    order_nW = by_id_nW.gather(1, z_nW.gather(1, by_id_nW).argsort(dim=1, descending=True, stable=True))
    return z_nW.gather(1, order_nW), ids_nW.gather(1, order_nW)


def gather_candidates(z_nv: Tensor, rows_nW: Tensor, width: int, vocab: VocabSlice) -> tuple[Tensor, Tensor]:
    """[n, g·width] logits and global ids of all slices' candidates, whose rows of this slice are given; in no order.

    Where a slice has fewer than `width`, its last logits are -inf, with id 0. One all-gather.
    """
    n = len(z_nv)
    own_nW2 = torch.stack([z_nv.gather(1, rows_nW), vocab.global_ids(z_nv.device)[rows_nW].to(z_nv.dtype)], dim=2)
    own_nW2 = torch.cat([own_nW2, z_nv.new_full((n, width - rows_nW.shape[1], 2), -math.inf)], dim=1)
    gathered_gnW2 = all_gather_rows(own_nW2, vocab.group).view(-1, n, width, 2)
    z_nW, ids_nW = gathered_gnW2.transpose(0, 1).flatten(1, 2).unbind(dim=2)
    return z_nW, ids_nW.clamp_min(0).long()


def _top_rows(z_bv: Tensor, width: int) -> Tensor:
    """[b, width]: the rows of the slice with the largest logits, in no order; of equals the first ones.

    `topk` takes any of equals. Where more logits equal the last one than fit, it runs again with the place as a second
    criterion: all that are above, then the first of the equals.
    """
    if width == 0:
        return torch.empty_like(z_bv, dtype=torch.int64)
    top_bW, rows_bW = z_bv.topk(width, dim=1)
    last_b1 = top_bW[:, -1:]
    crowded_b = (z_bv == last_b1).sum(dim=1) > (top_bW == last_b1).sum(dim=1)
    crowded_b &= last_b1.squeeze(1) > -math.inf
    if crowded_b.any():
        z_cv, last_c1 = z_bv[crowded_b], last_b1[crowded_b]
        earlier_v = -torch.arange(z_bv.shape[1], device=z_bv.device)
        rank_cv = torch.where(z_cv > last_c1, 1, torch.where(z_cv == last_c1, earlier_v, -z_bv.shape[1]))
        rows_bW[crowded_b] = rank_cv.topk(width, dim=1).indices
    return rows_bW


def _largest_count(z_nv: Tensor, lowest_n1: Tensor, vocab: VocabSlice) -> int:
    """The largest number of logits ≥ `lowest` of any token and slice, at least 1. A small all-gather and a sync."""
    counts = [(z_nv[block] >= lowest_n1[block]).sum(dim=1) for block in row_blocks(z_nv)]
    return max(1, int(all_gather_rows(torch.cat(counts).max().view(1), vocab.group).max()))


def _log_outside(z_nv: Tensor, ids_nW: Tensor, vocab: VocabSlice) -> Tensor:
    """[n]: ln Σ e^z over all other ids, with a maximum of their own, so that no tail is too small for its digits.

    The logits of the selected ids become -inf. One more small all-gather.
    """
    if z_nv.shape[1] > 0:
        rows_nW = vocab.local_rows(ids_nW)
        minimum_nW = z_nv.new_full((), math.inf).where(rows_nW < 0, -math.inf)
        z_nv.scatter_reduce_(1, rows_nW.clamp_min(0), minimum_nW, "amin")
    maximum_n = vocabulary_maximum(z_nv, vocab)
    sum_n = all_reduce_sum(exponential_sum(z_nv, maximum_n), vocab.group)
    return maximum_n + sum_n.log()
