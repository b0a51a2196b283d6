"""Each model's softmax over the whole vocabulary: a slice's statistics, one small all-gather, merged.

Legend: g ranks of the vocab group; n tokens of a chunk (of the whole group), b of them in a block; v this rank's true
rows of the vocabulary; K sparse target ids of a token; T the temperature of the divergence; S statistics of a slice and
model, `SLICE_STATS` (one more with the sum over a tail).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadistill.distributed.collectives import Pending, group_size, start_all_gather_rows
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import buffers, pointwise
from megadistill.loss.options import Elementwise
from megadistill.types import Tail

SLICE_STATS = 6
"""Numbers in the statistics of a token, model and slice: `Logits.stats`."""


@dataclass(frozen=True)
class SparseSlice:
    """The sparse targets of the tokens of a chunk, as this slice sees them."""

    rows_nK: Tensor
    """Each target id's row of this slice, -1 where another rank holds it, or where there is no id."""
    probs_nK: Tensor
    log_tail_n: Tensor
    tail: Tail

    def mask(self, rows: slice, v: int) -> Tensor:
        """[b, v] bool: target ids of this slice. Those of others are written to a column that is then cut off."""
        rows_bK = self.rows_nK[rows]
        mask = torch.zeros(rows_bK.shape[0], v + 1, dtype=torch.bool, device=rows_bK.device)
        return mask.scatter_(1, torch.where(rows_bK >= 0, rows_bK, v), True)[:, :v]


@dataclass(frozen=True)
class Logits:
    """One model's logits [n, v] on this slice."""

    z_nv: Tensor
    temperature: float
    elementwise: Elementwise
    """Eager or compiled."""

    def blocks(self) -> list[slice]:
        """Ranges of rows for one call of a `pointwise` function; none for an empty slice.

        Eager arithmetic on a CPU goes over blocks that its cache holds. On an accelerator each operation of a block is
        a kernel launch, of which a chunk of 2048 tokens and 32,000 ids would have 17,000.
        """
        n, v = self.z_nv.shape
        if n * v == 0:
            return []
        eager_on_cpu = self.elementwise is Elementwise.EAGER and self.z_nv.device.type == "cpu"
        return buffers.row_blocks(self.z_nv, buffers.BLOCK_ELEMENTS if eager_on_cpu else n * v)

    def kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of `pointwise`, as it is or compiled."""
        return pointwise.compiled(function) if self.elementwise is Elementwise.COMPILED else function

    def stats(self, label_rows_n: Tensor, ids_v: Tensor) -> Tensor:
        """[n, 6]: maximum, its global id, the three sums, and the label's logit (0 where others hold it).

        `ids_v` are the global ids of the rows, in the dtype of the logits. An empty slice has a maximum of -inf and
        sums of 0.
        """
        n, v = self.z_nv.shape
        stats_n6 = self.z_nv.new_zeros(n, SLICE_STATS)
        stats_n6[:, 0], stats_n6[:, 1] = -math.inf, math.inf
        if v == 0:
            return stats_n6
        slice_stats = self.kernel(pointwise.slice_stats)
        for rows in self.blocks():
            stats_n6[rows, :5] = slice_stats(self.z_nv[rows], ids_v, self.temperature)
        stats_n6[:, 5] = at_rows(self.z_nv, label_rows_n)
        return stats_n6

    def tail_sum(self, targets: SparseSlice, max_n: Tensor) -> Tensor:
        """[n, 1]: Σ e^((z-m)/T) over this slice's ids that are not among the targets."""
        sum_n = torch.zeros_like(max_n)
        tail_sum = self.kernel(pointwise.tail_sum)
        for rows in self.blocks():
            mask_bv = targets.mask(rows, self.z_nv.shape[1])
            sum_n[rows] = tail_sum(self.z_nv[rows], mask_bv, max_n[rows], self.temperature)
        return sum_n.unsqueeze(1)


@dataclass(frozen=True)
class Softmax:
    """One model's softmax over the whole vocabulary, for the tokens of a chunk.

    Sums are held apart from maxima: what is left is below the maximum, so that a constant added to a row of logits
    changes nothing, however large it is.
    """

    logits: Logits
    max_n: Tensor
    argmax_n: Tensor
    """The most likely id; the lowest where several are."""
    label_n: Tensor
    """The label's logit, less the maximum."""
    log_sum_n: Tensor
    """ln Σ e^(z - max)"""
    entropy_n: Tensor
    """Entropy in nats, at temperature 1."""
    log_sum_T_n: Tensor
    """ln Σ e^((z - max)/T)"""
    log_tail_sum_T_n: Tensor | None
    """The same over the ids that are not among the sparse targets; None without a tail of its own."""

    @property
    def log_z_n(self) -> Tensor:
        return self.max_n + self.log_sum_n

    @property
    def label_ce_n(self) -> Tensor:
        return self.log_sum_n - self.label_n

    def block(self, rows: slice) -> pointwise.SoftmaxBlock:
        """The arguments of a `pointwise` function."""
        return pointwise.SoftmaxBlock(
            self.logits.z_nv[rows], self.max_n[rows], self.log_sum_T_n[rows], self.log_sum_n[rows]
        )

    @classmethod
    def merged(cls, logits: Logits, stats_gnS: Tensor) -> "Softmax":
        """The statistics of all slices as one softmax."""
        max_gn, argmax_gn, sum_gn, product_gn, sum_T_gn, label_gn, *tail_gn = stats_gnS.unbind(dim=2)
        max_n = max_gn.amax(dim=0)
        below_gn = max_gn - max_n
        shrink_gn = below_gn.exp()
        sum_n = (shrink_gn * sum_gn).sum(dim=0)
        shrink_T_gn = (below_gn / logits.temperature).exp()
        # Σ e^y y of a slice is against its own maximum; -inf (a slice of nothing) is 0 times a number.
        product_n = (shrink_gn * (product_gn + below_gn.clamp_min(-1e30) * sum_gn)).sum(dim=0)
        return cls(
            logits=logits,
            max_n=max_n,
            argmax_n=torch.where(below_gn == 0, argmax_gn, math.inf).amin(dim=0),
            label_n=label_gn.sum(dim=0) - max_n,
            log_sum_n=sum_n.log(),
            entropy_n=sum_n.log() - product_n / sum_n,
            log_sum_T_n=(shrink_T_gn * sum_T_gn).sum(dim=0).log(),
            log_tail_sum_T_n=(shrink_T_gn * tail_gn[0]).sum(dim=0).log() if tail_gn else None,
        )


@dataclass(frozen=True)
class PendingSoftmax:
    """The softmaxes of a chunk, while the small all-gather of their statistics is in flight."""

    logits: tuple[Logits, ...]
    pending: Pending

    @classmethod
    def start(
        cls,
        logits: Sequence[Logits],
        label_rows_n: Tensor,
        ids_v: Tensor,
        vocab: VocabSlice,
        targets: SparseSlice | None,
    ) -> "PendingSoftmax":
        """Computes this slice's statistics of each model and starts one all-gather of them all."""
        stats = [each.stats(label_rows_n, ids_v) for each in logits]
        if targets is not None and targets.tail is Tail.OTHER:
            stats.append(logits[0].tail_sum(targets, stats[0][:, 0]))
        return cls(tuple(logits), start_all_gather_rows(torch.cat(stats, dim=1), vocab.group))

    def wait(self, vocab: VocabSlice) -> list[Softmax]:
        """The student's softmax, then the teacher's where there is one."""
        n = self.pending.source.shape[0]
        stats = self.pending.wait().view(group_size(vocab.group), n, -1).chunk(len(self.logits), dim=2)
        return [Softmax.merged(each, stats_gnS) for each, stats_gnS in zip(self.logits, stats, strict=True)]


def at_rows(z_nv: Tensor, rows: Tensor) -> Tensor:
    """The logit at a row of each token (`rows` [n], or [n, K] for several); 0 where another rank holds it (-1)."""
    if z_nv.shape[1] == 0:
        return z_nv.new_zeros(rows.shape)
    rows_nK = rows if rows.ndim == 2 else rows.unsqueeze(1)
    return torch.where(rows_nK >= 0, z_nv.gather(1, rows_nK.clamp_min(0)), 0).view(rows.shape)


def add_at_rows_(z_nv: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds to the logit at a row of each token (`rows` [n] or [n, K]); nothing where another rank holds it (-1)."""
    if z_nv.shape[1] == 0:
        return
    rows_nK, values_nK = (rows, values) if rows.ndim == 2 else (rows.unsqueeze(1), values.unsqueeze(1))
    z_nv.scatter_add_(1, rows_nK.clamp_min(0), torch.where(rows_nK >= 0, values_nK, 0))


def set_at_rows_(z_nv: Tensor, rows: Tensor, values: Tensor) -> None:
    """Overwrites the number at rows of each token, distinct ones; nothing where another rank holds them (-1).

    Without a host-device sync: a number and its negative add up to 0, and that and a number to the number.
    """
    add_at_rows_(z_nv, rows, -at_rows(z_nv, rows))
    add_at_rows_(z_nv, rows, values.to(z_nv.dtype))
