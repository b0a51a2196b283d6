"""Selection by draws from the teacher's distribution, over slices of the vocabulary.

Legend: n tokens of a chunk (of the whole group), k of this rank, b of a block; v this rank's true rows of the
vocabulary; M draws of a token; R ranges of global ids of this slice, G those of all slices; z logits over the
temperature.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum, reduce_scatter_rows
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.heads import padded
from megadistill.loss.sparse.exponentials import exponentials, row_blocks
from megadistill.loss.sparse.selection import SelectedIds
from megadistill.types import to_device


@dataclass(frozen=True)
class Ranges:
    """The true ranges of all slices, in the order of global ids, and the places of this rank's among them."""

    count: int
    """G."""
    places_R: Tensor
    """The place of each range of this rank among the G."""
    ends_R: Tensor
    """Local rows up to the end of each range of this rank."""

    @classmethod
    def gather(cls, vocab: VocabSlice, counts: tuple[int, ...], device: torch.device) -> "Ranges":
        """One small all-gather; `counts` are the true ranges of each rank."""
        own = true_ranges(vocab)
        starts = to_device(torch.tensor([start for start, _ in own], dtype=torch.int64), device)
        lengths = to_device(torch.tensor([stop - start for start, stop in own], dtype=torch.int64), device)
        all_starts = all_gather_rows(padded(starts, max(counts), vocab.size), vocab.group)
        places_R = torch.searchsorted(all_starts.sort().values, starts)
        return cls(count=sum(counts), places_R=places_R, ends_R=lengths.cumsum(0))


def true_ranges(vocab: VocabSlice) -> list[tuple[int, int]]:
    """The ranges of this slice without padding."""
    return [(start, min(stop, vocab.size)) for start, stop in vocab.ranges if start < min(stop, vocab.size)]


def draw(z_nv: Tensor, maximum_n: Tensor, uniforms_nM: Tensor, ranges: Ranges, vocab: VocabSlice) -> SelectedIds:
    """The targets of this rank's tokens of a chunk: each id once, with its share of the draws. Collective."""
    ids_kM = _drawn_ids(z_nv, maximum_n, uniforms_nM, ranges, vocab).sort(dim=1).values
    place_kM = pad((ids_kM.diff(dim=1) != 0).long(), (1, 0)).cumsum(dim=1)
    counts_kM = torch.zeros_like(ids_kM).scatter_add(1, place_kM, torch.ones_like(ids_kM))
    distinct_kM = torch.full_like(ids_kM, -1).scatter(1, place_kM, ids_kM)
    no_tail_k = torch.full_like(ids_kM[:, 0], -math.inf, dtype=torch.float64)
    return SelectedIds(distinct_kM, counts_kM.double() / ids_kM.shape[1], no_tail_k)


def _drawn_ids(z_nv: Tensor, maximum_n: Tensor, uniforms_nM: Tensor, ranges: Ranges, vocab: VocabSlice) -> Tensor:
    """[k, M]: the ids drawn for this rank's tokens.

    Two levels of the same search: every rank looks up the range of each draw in the masses of all ranges; the rank that
    holds the range looks up the row. Rounding may put a draw past the end of its range: then it is the last id with a
    mass.
    """
    n, v = z_nv.shape
    masses_nG = maximum_n.new_zeros(n, ranges.count, dtype=torch.float64)
    for block in row_blocks(z_nv):
        ends_bR = _cumulative(z_nv[block], maximum_n[block])[:, ranges.ends_R - 1]
        masses_nG[block, ranges.places_R] = ends_bR.diff(dim=1, prepend=ends_bR.new_zeros(ends_bR.shape[0], 1))
    cdf_nG = all_reduce_sum(masses_nG, vocab.group).cumsum(dim=1)
    point_nM = uniforms_nM * cdf_nG[:, -1:]
    place_nM = torch.minimum(
        torch.searchsorted(cdf_nG, point_nM, right=True), torch.searchsorted(cdf_nG, cdf_nG[:, -1:].contiguous())
    )
    point_nM -= pad(cdf_nG, (1, 0)).gather(1, place_nM)

    ids_nM = torch.zeros_like(place_nM)
    if v == 0:
        return reduce_scatter_rows(ids_nM, vocab.group)
    range_G = torch.full((ranges.count,), -1, device=z_nv.device)
    range_G[ranges.places_R] = torch.arange(ranges.places_R.shape[0], device=z_nv.device)
    ids_v = vocab.global_ids(z_nv.device)[:v]
    for block in row_blocks(z_nv):
        range_bM = range_G[place_nM[block]]
        cdf_bv = _cumulative(z_nv[block], maximum_n[block])
        ends_bR = cdf_bv[:, ranges.ends_R - 1]
        point_bM = point_nM[block] + pad(ends_bR, (1, 0)).gather(1, range_bM.clamp_min(0))
        end_bM = ends_bR.gather(1, range_bM.clamp_min(0))
        row_bM = torch.minimum(torch.searchsorted(cdf_bv, point_bM, right=True), torch.searchsorted(cdf_bv, end_bM))
        ids_nM[block] = torch.where(range_bM >= 0, ids_v[row_bM], 0)
    return reduce_scatter_rows(ids_nM, vocab.group)  # one rank has each id, the others have 0


def _cumulative(z_bv: Tensor, maximum_b: Tensor) -> Tensor:
    """[b, v] float64: Σ e^(z - m) up to each row of the slice."""
    return exponentials(z_bv, maximum_b).cumsum_(dim=1)
