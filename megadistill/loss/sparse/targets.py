"""Truncated targets, made from the teacher's hidden states: what is kept of its distribution, and what the rest holds.

It knows tensors, a `VocabSlice` and the collectives of comm; it does not know the student, nor where targets are
stored. `loss/reference.py` defines what it computes. The logits of a chunk of tokens exist at a time, each rank's on
its own slice; from the logits on the arithmetic is in float64, over blocks of rows.

Legend: N this rank's tokens, L those of the rank that has most; g ranks of the vocab group; k tokens that each of them
gives to a chunk, n = g·k tokens of a chunk, b of them in a block; E teacher width; w this rank's rows of the
vocabulary, v of them true (not padding); W candidates of a token, K ids kept of it; M draws of a token; R ranges of
this rank's slice, G those of the whole group; T the temperature; z logits over T; m their maximum over the vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megadistill.distributed.collectives import (
    all_gather_rows,
    all_reduce_sum,
    group_rank,
    group_size,
    reduce_scatter_rows,
)
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.buffers import LOGIT_MEMORY
from megadistill.loss.heads import Head, multiply, operand, padded
from megadistill.loss.pointwise import transform_
from megadistill.types import LogitTransform, SparseTargets, Tail

BLOCK_ELEMENTS = 1 << 18
"""Elementwise work goes over blocks of about this many logits, whose temporaries stay in a CPU's cache."""

ACCELERATOR_BLOCK_ELEMENTS = 1 << 24
"""The same on an accelerator, where a block is a launch: 128 MiB of float64."""


@dataclass(frozen=True)
class Sampled:
    """`draws` independent draws from the teacher's distribution; a target is counts/draws, which is unbiased
    (arXiv:2503.16870). The draws are values that are passed (`uniforms`), so the same ones give the same ids again."""

    draws: int

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(
                f"draws is {self.draws}; a target needs at least one draw, and 50 come close to the full KL"
            )


@dataclass(frozen=True)
class TopK:
    """The k most likely ids; all of them where the vocabulary has fewer."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; keep at least one id")


@dataclass(frozen=True)
class Threshold:
    """Every id with p ≥ epsilon: at most 1/epsilon of them, and none where the teacher is too uncertain."""

    epsilon: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}; it is the lowest probability that is kept, between 0 and 1")


@dataclass(frozen=True)
class TopP:
    """The fewest ids that together reach `mass`, the most likely first, and at most `max_ids` of them: 0.95 and 50 in
    Peng et al. (arXiv:2410.16215)."""

    mass: float
    max_ids: int

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1:
            raise ValueError(f"mass is {self.mass}; pass a share between 0 and 1, or TopK({self.max_ids}) to keep all")
        if self.max_ids < 1:
            raise ValueError(f"max_ids is {self.max_ids}; keep at least one id")


Selection = Sampled | TopK | Threshold | TopP


@torch.no_grad()
def sparse_targets(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    selection: Selection,
    tail: Tail,
    vocab: VocabSlice,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: LogitTransform = LogitTransform(),
    logit_memory: int = LOGIT_MEMORY,
) -> SparseTargets:
    """What `selection` keeps of the teacher's distribution at `temperature`, for this rank's tokens.

    Collective over `vocab.group`: every rank passes its own N tokens (N may differ, and may be 0) and its own rows of
    the head. The result is that of one rank with the whole vocabulary, whatever the slices. An id that the teacher
    does not know (its logit is -inf) is never kept and has no mass.

    Args:
        teacher_hidden: [N, E], what the teacher's head reads; float64, float32 or bfloat16, products accumulate in
            float32 (float64 for float64).
        teacher_weight: [w, E], this rank's rows, of the same dtype. Padding rows are never read, and may be missing.
        selection: which ids are kept.
        tail: what becomes of the mass outside; `Tail.RENORMALISED` alone for `Sampled`. A token of which a threshold
            keeps nothing is all tail; with `Tail.RENORMALISED` it keeps its most likely id.
        vocab: which rows of the vocabulary this rank holds; slices may be uneven, empty or block-cyclic.
        uniforms: [N, draws] float64 in [0, 1), for `Sampled` alone. A draw is the first id, in the order of global
            ids, up to which the distribution adds up to more than its uniform number.
        teacher_bias: [w], added to the products; -inf for an id that the teacher does not know.
        teacher_logits: what the teacher does to its products before the softmax.
        logit_memory: bytes of this rank's logits. The rank with the least room decides the chunk, of one token a rank
            at least.

    Returns:
        `SparseTargets`, float32 (float64 for float64) without gradient. K is the largest number of ids that a token of
        the group keeps. The ids of a row go from the most likely down, of equals the lowest first; those of `Sampled`
        ascend.

    Raises:
        ValueError: shapes, dtypes or uniforms that do not fit, a tail for counts, or slices that do not add up to the
            vocabulary.
    """
    request = _Request(
        head=Head("teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_logits),
        uniforms_NM=uniforms,
        selection=selection,
        tail=tail,
        vocab=vocab,
        temperature=temperature,
        logit_memory=logit_memory,
    )
    agreed = _agree(request)
    tokens, g, rank = teacher_hidden.shape[0], group_size(vocab.group), group_rank(vocab.group)
    weight_vE = request.head.rows(vocab, request.dtype)
    buffer = teacher_hidden.new_empty((g * agreed.chunk, vocab.true_rows), dtype=request.dtype)
    found = []
    for start in range(0, agreed.longest, agreed.chunk):
        stop = min(start + agreed.chunk, agreed.longest)
        z_nv = buffer[: g * (stop - start)]
        _read_logits(request, weight_vE, start, stop, out=z_nv)
        maximum_n = _maximum(z_nv, vocab)
        if isinstance(selection, Sampled):
            uniforms_nM = _gathered(request.uniforms, start, stop, vocab)
            kept = _compacted(_draw(z_nv, maximum_n, uniforms_nM, agreed.ranges, vocab))
        else:
            kept = _keep_most_likely(z_nv, maximum_n, selection, tail, agreed.widest, vocab)
            kept = kept[rank * (stop - start) : (rank + 1) * (stop - start)]
        found.append(kept[: max(0, tokens - start)])
    return _assembled(found, request)


@dataclass(frozen=True)
class _Request:
    """The arguments of a call, and what follows from them."""

    head: Head
    uniforms_NM: Tensor | None
    selection: Selection
    tail: Tail
    vocab: VocabSlice
    temperature: float
    logit_memory: int

    def __post_init__(self) -> None:
        self.head.require_fit(self.head.hidden_ND.shape[0], self.vocab)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}; it divides the logits, so pass a positive number")
        if self.logit_memory < 1:
            raise ValueError(f"logit_memory is {self.logit_memory}; pass the bytes that the logits may take")
        self._require_uniforms()
        assert self.vocab.size < 2**24, "ids travel among float32 logits, which hold them exactly below 2**24"

    def _require_uniforms(self) -> None:
        if not isinstance(self.selection, Sampled):
            if self.uniforms_NM is not None:
                raise ValueError(f"{self.selection} draws nothing; pass uniforms for Sampled alone")
            return
        if self.tail is not Tail.RENORMALISED:
            raise ValueError(
                f"tail is {self.tail.value}, but counts of draws add up to 1 and leave none; pass Tail.RENORMALISED"
            )
        shape = (self.head.hidden_ND.shape[0], self.selection.draws)
        if self.uniforms_NM is None or self.uniforms_NM.shape != shape or self.uniforms_NM.dtype != torch.float64:
            given = "none" if self.uniforms_NM is None else f"{list(self.uniforms_NM.shape)} {self.uniforms_NM.dtype}"
            raise ValueError(
                f"{self.selection} needs uniforms {list(shape)} torch.float64, got {given}; "
                f"torch.rand({shape[0]}, {shape[1]}, dtype=torch.float64) makes them"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits and of the result."""
        return torch.float64 if self.head.hidden_ND.dtype == torch.float64 else torch.float32

    @property
    def uniforms(self) -> Tensor:
        assert self.uniforms_NM is not None
        return self.uniforms_NM


@dataclass(frozen=True)
class _Agreed:
    """What the ranks know of each other."""

    longest: int
    """L."""
    chunk: int
    """k."""
    widest: int
    """The largest v."""
    ranges: "_Ranges"


@dataclass(frozen=True)
class _Ranges:
    """The true ranges of all slices, in the order of global ids, and where this rank's are among them."""

    count: int
    """G."""
    places_R: Tensor
    """The place of each range of this rank among the G."""
    ends_R: Tensor
    """Local rows up to the end of each range of this rank."""


def _agree(request: _Request) -> _Agreed:
    """Two small all-gathers of what the ranks must know of each other, with host-device syncs."""
    vocab, hidden = request.vocab, request.head.hidden_ND
    g, v, u = group_size(vocab.group), vocab.true_rows, request.uniforms_NM
    affordable = request.logit_memory // (max(1, v) * request.dtype.itemsize * g)
    ranges = [(start, min(stop, vocab.size)) for start, stop in vocab.ranges if start < min(stop, vocab.size)]
    strangers = 0 if u is None else int(((u >= 0) & (u < 1)).logical_not().sum())
    told = torch.tensor([[hidden.shape[0], v, affordable, len(ranges), strangers]], device=hidden.device)
    tokens, rows, room, counts, outside = zip(*all_gather_rows(told, vocab.group).tolist(), strict=True)
    if sum(rows) != vocab.size:
        raise ValueError(f"the slices hold {list(rows)} true rows, which do not add up to a vocabulary of {vocab.size}")
    if any(outside):
        raise ValueError(f"{list(outside)} uniforms (by rank) are not in [0, 1); torch.rand makes numbers that are")

    starts = torch.tensor([start for start, _ in ranges], dtype=torch.int64, device=hidden.device)
    everyone = all_gather_rows(padded(starts, max(counts), vocab.size), vocab.group)
    lengths = torch.tensor([stop - start for start, stop in ranges], dtype=torch.int64, device=hidden.device)
    places_R = torch.searchsorted(everyone.sort().values, starts)
    longest = int(max(tokens))
    return _Agreed(
        longest=longest,
        chunk=max(1, min(int(min(room)), longest)),
        widest=int(max(rows)),
        ranges=_Ranges(count=int(sum(counts)), places_R=places_R, ends_R=lengths.cumsum(0)),
    )


def _read_logits(request: _Request, weight_vE: Tensor, start: int, stop: int, *, out: Tensor) -> None:
    """The group's tokens `start` to `stop` (of each rank): z on this slice."""
    head = request.head
    hidden_nE = operand(_gathered(head.hidden_ND, start, stop, request.vocab), request.dtype)
    multiply(hidden_nE, weight_vE.T, out=out)
    transform_(out, head.bias(request.vocab, request.dtype), head.transform.scale, head.transform.softcap)
    if request.temperature != 1.0:
        out.div_(request.temperature)


@dataclass(frozen=True)
class _Kept:
    """What is kept of some tokens: ids [n, W], -1 after the last one of a row; probs [n, W]; log_tail [n]."""

    ids: Tensor
    probs: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: slice) -> "_Kept":
        return _Kept(self.ids[rows], self.probs[rows], self.log_tail[rows])

    @property
    def width(self) -> int:
        """The largest number of ids of a token."""
        return int((self.ids >= 0).any(dim=0).sum())


def _assembled(found: list[_Kept], request: _Request) -> SparseTargets:
    """The chunks of this rank's tokens, as wide as the token of the group that keeps most."""
    tokens, hidden = request.head.hidden_ND.shape[0], request.head.hidden_ND
    own = torch.tensor([max((kept.width for kept in found), default=0)], device=hidden.device)
    K = int(all_gather_rows(own, request.vocab.group).max())
    ids_NK = hidden.new_full((tokens, K), -1, dtype=torch.int64)
    probs_NK = hidden.new_zeros((tokens, K), dtype=request.dtype)
    log_tail_N = hidden.new_empty((tokens,), dtype=request.dtype)
    start = 0
    for kept in found:
        rows, columns = slice(start, start + kept.ids.shape[0]), slice(0, min(K, kept.ids.shape[1]))
        ids_NK[rows, columns] = kept.ids[:, columns]
        probs_NK[rows, columns] = kept.probs[:, columns].to(request.dtype)
        log_tail_N[rows] = kept.log_tail.to(request.dtype)
        start = rows.stop
    return SparseTargets(ids_NK, probs_NK, log_tail_N, request.tail, request.temperature)


# The most likely ids.


def _keep_most_likely(
    z_nv: Tensor,
    maximum_n: Tensor,
    selection: TopK | Threshold | TopP,
    tail: Tail,
    widest: int,
    vocab: VocabSlice,
) -> _Kept:
    """For the tokens of a chunk. The logits of what is kept are overwritten where the tail is asked for."""
    sum_n = all_reduce_sum(_exponential_sum(z_nv, maximum_n), vocab.group)
    if isinstance(selection, Threshold):
        cut_n1 = (maximum_n + (selection.epsilon * sum_n).log()).unsqueeze(1)
        width = _largest_count(z_nv, cut_n1, vocab)
        limit = vocab.size
    else:
        limit = min(selection.k if isinstance(selection, TopK) else selection.max_ids, vocab.size)
        width = min(limit, widest)
    z_nW, ids_nW = _most_likely(z_nv, width, vocab)
    z_nW, ids_nW = z_nW[:, :limit].double(), ids_nW[:, :limit]
    p_nW = (z_nW - maximum_n.unsqueeze(1)).exp() / sum_n.unsqueeze(1)

    kept_nW = z_nW > -math.inf
    if isinstance(selection, TopP):
        kept_nW &= pad(p_nW.cumsum(dim=1)[:, :-1], (1, 0)) < selection.mass
    elif isinstance(selection, Threshold):
        above_nW = z_nW >= cut_n1
        above_nW[:, 0] |= tail is Tail.RENORMALISED
        kept_nW &= above_nW
    ids_nW = torch.where(kept_nW, ids_nW, -1)
    if tail is Tail.RENORMALISED:
        probs_nW = torch.where(kept_nW, z_nW, -math.inf).softmax(dim=1)
        return _Kept(ids_nW, probs_nW, torch.full_like(sum_n, -math.inf))
    log_tail_n = _log_outside(z_nv, ids_nW, vocab) - maximum_n - sum_n.log()
    return _Kept(ids_nW, torch.where(kept_nW, p_nW, 0), log_tail_n)


def _most_likely(z_nv: Tensor, width: int, vocab: VocabSlice) -> tuple[Tensor, Tensor]:
    """[n, g·width] logits and ids of every slice's `width` most likely ids, in order; of equals the lowest id first.

    Where slices have fewer, the logits at the end are -inf. One all-gather.
    """
    n, v = z_nv.shape
    rows_nW = torch.cat([_top_rows(z_nv[block], min(width, v)) for block in _row_blocks(z_nv)])
    told_nW2 = torch.stack([z_nv.gather(1, rows_nW), vocab.global_ids(z_nv.device)[rows_nW].to(z_nv.dtype)], dim=2)
    told_nW2 = torch.cat([told_nW2, z_nv.new_full((n, width - rows_nW.shape[1], 2), -math.inf)], dim=1)
    everyone_gnW2 = all_gather_rows(told_nW2, vocab.group).view(-1, n, width, 2)
    z_nW, ids_nW = everyone_gnW2.transpose(0, 1).flatten(1, 2).unbind(dim=2)
    by_id_nW = ids_nW.argsort(dim=1)
    order_nW = by_id_nW.gather(1, z_nW.gather(1, by_id_nW).argsort(dim=1, descending=True, stable=True))
    ids_nW = ids_nW.clamp_min(-1).long()
    return z_nW.gather(1, order_nW), ids_nW.gather(1, order_nW)


def _top_rows(z_bv: Tensor, width: int) -> Tensor:
    """[b, width]: the rows of the slice with the largest logits, in no order; of equals the first ones.

    `topk` takes any of equals. Where more of them are equal to the last one than there is room for, it is asked again:
    for all that are above, and then for the first of the equals.
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


def _largest_count(z_nv: Tensor, cut_n1: Tensor, vocab: VocabSlice) -> int:
    """How many logits above the cut the fullest slice has of a token, at least 1. A small all-gather and a sync."""
    counts = [(z_nv[block] >= cut_n1[block]).sum(dim=1) for block in _row_blocks(z_nv)]
    return max(1, int(all_gather_rows(torch.cat(counts).max().view(1), vocab.group).max()))


def _log_outside(z_nv: Tensor, ids_nW: Tensor, vocab: VocabSlice) -> Tensor:
    """[n]: ln Σ e^z over the ids that are not kept, with a maximum of their own: no tail is too small to be told.

    The logits of the kept ids become -inf. One more small all-gather.
    """
    if z_nv.shape[1] > 0:
        rows_nW = vocab.local_rows(ids_nW)
        gone_nW = z_nv.new_tensor(math.inf).where(rows_nW < 0, -math.inf)
        z_nv.scatter_reduce_(1, rows_nW.clamp_min(0), gone_nW, "amin")
    maximum_n = _maximum(z_nv, vocab)
    sum_n = all_reduce_sum(_exponential_sum(z_nv, maximum_n), vocab.group)
    return maximum_n + sum_n.log()


# Draws.


def _draw(z_nv: Tensor, maximum_n: Tensor, uniforms_nM: Tensor, ranges: _Ranges, vocab: VocabSlice) -> Tensor:
    """[k, M]: the ids drawn for this rank's tokens.

    Two levels of the same search: every rank finds the range of each draw, from the masses of all ranges; the rank
    that holds it finds the row. Rounding may put a draw past the end of its range: then it is the last id with a mass.
    """
    n, v = z_nv.shape
    masses_nG = maximum_n.new_zeros(n, ranges.count, dtype=torch.float64)
    for block in _row_blocks(z_nv):
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
    for block in _row_blocks(z_nv):
        range_bM = range_G[place_nM[block]]
        cdf_bv = _cumulative(z_nv[block], maximum_n[block])
        ends_bR = cdf_bv[:, ranges.ends_R - 1]
        point_bM = point_nM[block] + pad(ends_bR, (1, 0)).gather(1, range_bM.clamp_min(0))
        end_bM = ends_bR.gather(1, range_bM.clamp_min(0))
        row_bM = torch.minimum(torch.searchsorted(cdf_bv, point_bM, right=True), torch.searchsorted(cdf_bv, end_bM))
        ids_nM[block] = torch.where(range_bM >= 0, ids_v[row_bM], 0)
    # One rank knows each id, and the others say 0.
    return reduce_scatter_rows(ids_nM, vocab.group)


def _compacted(ids_kM: Tensor) -> _Kept:
    """Each id once, with its share of the draws."""
    draws = ids_kM.shape[1]
    ids_kM = ids_kM.sort(dim=1).values
    place_kM = pad((ids_kM.diff(dim=1) != 0).long(), (1, 0)).cumsum(dim=1)
    counts_kM = torch.zeros_like(ids_kM).scatter_add(1, place_kM, torch.ones_like(ids_kM))
    distinct_kM = torch.full_like(ids_kM, -1).scatter(1, place_kM, ids_kM)
    nothing_k = torch.full_like(ids_kM[:, 0], -math.inf, dtype=torch.float64)
    return _Kept(distinct_kM, counts_kM.double() / draws, nothing_k)


# What both read of the logits.


def _maximum(z_nv: Tensor, vocab: VocabSlice) -> Tensor:
    """[n] float64: m; a finite number where every logit is -inf. One small all-gather."""
    n, v = z_nv.shape
    own_n = z_nv.amax(dim=1) if v > 0 else z_nv.new_full((n,), -math.inf)
    maximum_n = all_gather_rows(own_n, vocab.group).view(-1, n).amax(dim=0)
    return maximum_n.clamp_min(torch.finfo(z_nv.dtype).min).double()


def _exponential_sum(z_nv: Tensor, maximum_n: Tensor) -> Tensor:
    """[n] float64: this slice's Σ e^(z - m)."""
    return torch.cat([_exponentials(z_nv[block], maximum_n[block]).sum(dim=1) for block in _row_blocks(z_nv)])


def _cumulative(z_bv: Tensor, maximum_b: Tensor) -> Tensor:
    """[b, v] float64: Σ e^(z - m) up to each row of the slice."""
    return _exponentials(z_bv, maximum_b).cumsum_(dim=1)


def _exponentials(z_bv: Tensor, maximum_b: Tensor) -> Tensor:
    return (z_bv - maximum_b.unsqueeze(1)).exp_()


def _row_blocks(z_nv: Tensor) -> Iterator[slice]:
    n, v = z_nv.shape
    elements = BLOCK_ELEMENTS if z_nv.device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
    step = max(1, elements // max(1, v))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _gathered(rows: Tensor, start: int, stop: int, vocab: VocabSlice) -> Tensor:
    """Rows `start` to `stop` of every rank, one rank after the other; zeros after a rank's last one."""
    return all_gather_rows(padded(rows[start:stop], stop - start, 0), vocab.group)
