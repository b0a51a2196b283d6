"""Exact attention on a CPU in O(S · block) memory: a block of queries at a time, over all keys that it sees.

A block sees all its keys in one product, so its softmax is complete, forward and backward: nothing is rescaled, and no
statistic is saved. The backward pass computes the probabilities again from queries and keys. Statistics are float32,
in bfloat16 too. It is an operator of torch's, so that `torch.compile` takes it as one node of a layer's graph and
selective checkpointing can name it.

Legend: B sequences, S tokens of a sequence, H query heads, G key heads, R = H / G query heads of a key head, D columns
of a head, N = B · G pairs of sequence and key head. A row is a query of one head: the R heads of a group are
neighbours, so that one product serves them all and no key is repeated.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Queries of a block: half a block's keys are computed and masked, and products of fewer rows are slower."""

PIECE_ELEMENTS = 1 << 18
"""Most scores at a time, or a block of one key head: what stays in a core's cache between the passes over them."""

OPERATOR = "megadistill::blockwise_attention"


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(c · tanh(q k / c)) v of [B, H, S, D], [B, G, S, D], [B, G, S, D] -> [B, S, H, D], in the inputs' type.

    Args:
        first_key: [B or 1, S] int64: first key that a query sees, never decreasing along S; the last is its own. None:
            the first of the sequence.
        scale: of the products q k.
        softcap: c; None: the scores are not bounded.
        sinks: [H]: score of one more key of each head, that all queries see and whose value is 0. None: there is none.
    """
    rows = _Rows.of(query, key, value, scale=scale, softcap=softcap, sinks=sinks)
    out_NRD = torch.empty_like(rows.query)
    for piece in _pieces(rows, first_key):
        probabilities = rows.probabilities(piece).of_keys
        torch.bmm(probabilities, rows.value[piece.pairs, piece.keys], out=out_NRD[piece.pairs, piece.rows])
    B, H, S, D = query.shape
    return rows.unpacked(out_NRD).reshape(B, S, H, D).to(query.dtype)


def compute_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks, contiguous, from the gradient [B, S, H, D] of the output.

    Without sinks, theirs has no element.
    """
    rows = _Rows.of(query, key, value, scale=scale, softcap=softcap, sinks=sinks)
    gradient_NRD = rows.packed(gradient.transpose(1, 2))
    dquery_NRD = torch.empty_like(rows.query)
    dsinks_NR = None if rows.sinks is None else torch.zeros_like(rows.sinks)
    dkey_NSD, dvalue_NSD = torch.zeros_like(rows.key), torch.zeros_like(rows.value)
    for piece in _pieces(rows, first_key):
        at_rows, at_keys = (piece.pairs, piece.rows), (piece.pairs, piece.keys)
        probabilities, of_sinks, tanh = rows.probabilities(piece)
        dvalue_NSD[at_keys].baddbmm_(probabilities.transpose(1, 2), gradient_NRD[at_rows])
        dprobabilities = torch.bmm(gradient_NRD[at_rows], rows.value[at_keys].transpose(1, 2))
        if dsinks_NR is not None and of_sinks is not None:
            # The value of a sink is 0, so its probability has no gradient but that of the softmax.
            dsinks = of_sinks * torch.linalg.vecdot(probabilities, dprobabilities)
            dsinks_NR[piece.pairs] -= dsinks.view(len(dsinks), -1, dsinks_NR.shape[1]).sum(1)
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype)
        if tanh is not None:
            dscores = torch.ops.aten.tanh_backward(dscores, tanh)
        torch.bmm(dscores, rows.key[at_keys], out=dquery_NRD[at_rows])
        dkey_NSD[at_keys].baddbmm_(dscores.transpose(1, 2), rows.query[at_rows])
    # `rows.query` has the scale, over the softcap where there is one: c · (1 - tanh²) is the slope of the capped score.
    dquery_NRD.mul_(scale)
    if softcap is not None:
        dkey_NSD.mul_(softcap)
    dquery = rows.unpacked(dquery_NRD).reshape(gradient.shape).transpose(1, 2)
    return (
        dquery.to(query.dtype).contiguous(),
        dkey_NSD.view(key.shape).to(key.dtype),
        dvalue_NSD.view(value.shape).to(value.dtype),
        query.new_empty(0) if dsinks_NR is None else rows.summed(dsinks_NR).to(query.dtype),
    )


blockwise_attention = torch.library.custom_op(OPERATOR, compute, mutates_args=())
blockwise_attention_backward = torch.library.custom_op(f"{OPERATOR}_backward", compute_gradients, mutates_args=())


@blockwise_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    B, H, S, D = query.shape
    return query.new_empty(B, S, H, D)


@blockwise_attention_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = query.new_empty(0 if sinks is None else len(sinks))
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, first_key, ctx.scale, ctx.softcap, sinks = inputs
    ctx.save_for_backward(query, key, value, first_key, sinks)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, first_key, sinks = ctx.saved_tensors
    *gradients, dsinks = blockwise_attention_backward(
        gradient, query, key, value, first_key, ctx.scale, ctx.softcap, sinks
    )
    return *gradients, None, None, None, None if sinks is None else dsinks.to(sinks.dtype)


blockwise_attention.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Rows:
    """Inputs of a call, laid out for batched products, in float32 (float64 for float64)."""

    query: Tensor
    """[N, S·R, D], times the scale, over the softcap where there is one."""
    key: Tensor
    """[N, S, D]."""
    value: Tensor
    """[N, S, D]."""
    shape: tuple[int, int, int, int]
    """(B, G, R, S)."""
    softcap: float | None
    sinks: Tensor | None
    """[N, R]: score of the sink of each row's head; None: there are none."""

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> "_Rows":
        B, H, S, D = query.shape
        G = key.shape[1]
        dtype = torch.promote_types(query.dtype, torch.float32)
        key_NSD, value_NSD = (each.to(dtype).reshape(B * G, S, D) for each in (key, value))
        sinks_NR = None if sinks is None else sinks.to(dtype).view(G, H // G).repeat(B, 1)
        rows = cls(query, key_NSD, value_NSD, (B, G, H // G, S), softcap, sinks_NR)
        query_NRD = rows.packed(query) * (scale if softcap is None else scale / softcap)
        return replace(rows, query=query_NRD)

    def packed(self, heads_BHSD: Tensor) -> Tensor:
        """[B, H, S, D] -> [N, S·R, D] in the type of the arithmetic."""
        B, G, R, S = self.shape
        grouped = heads_BHSD.to(self.key.dtype).reshape(B, G, R, S, -1)
        return grouped.transpose(2, 3).reshape(B * G, S * R, -1)

    def unpacked(self, rows_NRD: Tensor) -> Tensor:
        """[N, S·R, D] -> [B, S, G, R, D], a view."""
        B, G, R, S = self.shape
        return rows_NRD.view(B, G, S, R, -1).transpose(1, 2)

    def summed(self, sinks_NR: Tensor) -> Tensor:
        """[N, R] -> [H]: the sum over the sequences."""
        B, G, R, _ = self.shape
        return sinks_NR.view(B, G * R).sum(0)

    def probabilities(self, piece: "_Piece") -> "_Probabilities":
        """Probabilities of the piece's rows over its keys, with those of the sinks, and the capped scores' tanh."""
        scores = torch.bmm(self.query[piece.pairs, piece.rows], self.key[piece.pairs, piece.keys].transpose(1, 2))
        tanh = None
        if self.softcap is not None:
            tanh = scores.tanh_()
            scores = tanh * self.softcap
        piece.mask_(scores)
        if self.sinks is None:
            return _Probabilities(scores.softmax(-1), None, tanh)
        sinks_PR = self.sinks[piece.pairs].repeat(1, scores.shape[1] // self.sinks.shape[1])
        probabilities = torch.cat([scores, sinks_PR.unsqueeze(-1)], dim=-1).softmax(-1)
        return _Probabilities(probabilities[..., :-1].contiguous(), probabilities[..., -1], tanh)


class _Probabilities(NamedTuple):
    """A piece's P pairs of R rows over W keys."""

    of_keys: Tensor
    """[P, R, W]."""
    of_sinks: Tensor | None
    """[P, R]; None: there are no sinks."""
    tanh: Tensor | None
    """[P, R, W]: of the scores over the softcap; None: there is none."""


@dataclass(frozen=True)
class _Piece:
    """Scores that are computed at a time: some pairs' rows of a block of queries, over the keys that any of them sees.

    Legend: P pairs of the piece, b sequences that they belong to, L queries of the block, W keys.
    """

    pairs: slice
    rows: slice
    keys: slice
    later_RL: Tensor
    """[L·R, L]: -inf where one of the last L keys is later than the row's query, else 0."""
    earlier_bLw: Tensor | None
    """[b or 1, L, w]: whether one of the first w keys is earlier than the first that the query sees. None: none is."""
    sequences: int
    """b."""

    def mask_(self, scores_PRW: Tensor) -> None:
        """Sets the scores of keys that a row does not see to -inf."""
        L = self.later_RL.shape[1]
        pairs, rows, keys = scores_PRW.shape
        scores_PRW[..., keys - L :].add_(self.later_RL)
        if self.earlier_bLw is not None:
            scores_bgLRW = scores_PRW.view(self.sequences, pairs // self.sequences, L, rows // L, keys)
            earlier = self.earlier_bLw[:, None, :, None, :]
            scores_bgLRW[..., : earlier.shape[-1]].masked_fill_(earlier, -math.inf)


def _pieces(rows: _Rows, first_key: Tensor | None) -> Iterator[_Piece]:
    B, G, R, S = rows.shape
    later = torch.full((BLOCK, BLOCK), -math.inf, dtype=rows.key.dtype).triu(1).repeat_interleave(R, dim=0)
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        L = stop - start
        most = max(1, PIECE_ELEMENTS // (L * R * stop))
        together = max(1, most // G)
        for first in range(0, B, together):
            sequences = min(together, B - first)
            low, earlier = 0, None
            if first_key is not None:
                first_bL = (
                    first_key[first : first + sequences, start:stop] if len(first_key) > 1 else first_key[:, start:stop]
                )
                low, high = int(first_bL[:, 0].min()), int(first_bL[:, -1].max())
                if high > low:
                    earlier = first_bL.unsqueeze(-1) > torch.arange(low, high)
            each = G * sequences if most >= G else most
            for pair in range(first * G, (first + sequences) * G, each):
                last = min(pair + each, (first + sequences) * G)
                yield _Piece(
                    pairs=slice(pair, last),
                    rows=slice(start * R, stop * R),
                    keys=slice(low, stop),
                    later_RL=later[: L * R, :L],
                    earlier_bLw=earlier,
                    sequences=sequences,
                )
