"""Each model's softmax over the whole vocabulary, seen from one slice of it: read, gathered, merged.

It knows logits and the one small all-gather that it takes; it does not know divergences or slopes.

Legend: g ranks of the vocab group; n tokens of a chunk (of the whole group), b of them in a block; v this rank's true
rows of the vocabulary; K ids kept of a token; T the temperature of the divergence; S statistics of a slice, 6 or 7.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadistill.distributed.collectives import Pending, group_size, start_all_gather_rows
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import pointwise
from megadistill.loss.divergence import Elementwise
from megadistill.types import Tail

BLOCK_ELEMENTS = 1 << 18
"""Eager arithmetic goes over blocks of about this many logits: its temporaries stay small, and in a CPU's cache."""


@dataclass(frozen=True)
class Kept:
    """Sparse targets of the tokens of a chunk."""

    rows_nK: Tensor
    """Each kept id's row of this slice, -1 where another rank holds it, or where there is no id."""
    probs_nK: Tensor
    log_tail_n: Tensor
    tail: Tail

    def mask(self, rows: slice, v: int) -> Tensor:
        """[b, v] bool: this slice's kept ids. What others hold is written to a column that is then cut off."""
        rows_bK = self.rows_nK[rows]
        mask = torch.zeros(rows_bK.shape[0], v + 1, dtype=torch.bool, device=rows_bK.device)
        return mask.scatter_(1, torch.where(rows_bK >= 0, rows_bK, v), True)[:, :v]


@dataclass(frozen=True)
class Logits:
    """One model's logits [n, v] on this slice, and how they are worked on: in blocks of rows, or compiled and whole."""

    z_nv: Tensor
    temperature: float
    elementwise: Elementwise

    def blocks(self) -> list[slice]:
        """Rows that are worked on at a time; none for an empty slice."""
        n, v = self.z_nv.shape
        if v == 0:
            return []
        step = n if self.elementwise is Elementwise.COMPILED else max(1, BLOCK_ELEMENTS // v)
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def stage(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of `pointwise`, as it is or compiled."""
        return pointwise.compiled(function) if self.elementwise is Elementwise.COMPILED else function

    def statistics(self, label_rows_n: Tensor, vocab: VocabSlice) -> Tensor:
        """[n, 6]: maximum, its global id, the label's logit (0 where others hold it), and the three sums.

        An empty slice tells a maximum of -inf and sums of 0.
        """
        n, v = self.z_nv.shape
        told_nS = self.z_nv.new_tensor([-math.inf, math.inf, 0.0, 0.0, 0.0, 0.0]).repeat(n, 1)
        if v == 0:
            return told_nS
        statistics = self.stage(pointwise.statistics)
        ids_v = vocab.global_ids(self.z_nv.device)[:v].to(self.z_nv.dtype)
        for rows in self.blocks():
            maximum_b, best_b, *sums = statistics(self.z_nv[rows], ids_v, self.temperature).unbind(dim=1)
            told_nS[rows] = torch.stack([maximum_b, best_b, told_nS[rows, 2], *sums], dim=1)
        told_nS[:, 2] = at_rows(self.z_nv, label_rows_n)
        return told_nS

    def outside(self, kept: Kept, maximum_n: Tensor) -> Tensor:
        """[n, 1]: Σ e^((z-m)/T) over this slice's ids that are not kept."""
        outside_n = torch.zeros_like(maximum_n)
        for rows in self.blocks():
            mask_bv = kept.mask(rows, self.z_nv.shape[1])
            outside_n[rows] = self.stage(pointwise.outside_sum)(
                self.z_nv[rows], mask_bv, maximum_n[rows], self.temperature
            )
        return outside_n.unsqueeze(1)


@dataclass(frozen=True)
class Softmax:
    """One model's softmax over the whole vocabulary, for the tokens of a chunk.

    Sums are kept apart from maxima: what is left is below the maximum, so that a constant added to a row of logits
    changes nothing, however large it is.
    """

    logits: Logits
    maximum_n: Tensor
    best_n: Tensor
    """The most likely id; the lowest where several are."""
    label_n: Tensor
    """The label's logit, less the maximum."""
    log_sum_n: Tensor
    """ln Σ e^(z - maximum)."""
    entropy_n: Tensor
    """At temperature 1."""
    log_warm_n: Tensor
    """ln Σ e^((z - maximum)/T)."""
    log_outside_n: Tensor | None
    """The same over the ids that are not kept, where that was asked for."""

    @property
    def log_z_n(self) -> Tensor:
        return self.maximum_n + self.log_sum_n

    @property
    def label_ce_n(self) -> Tensor:
        return self.log_sum_n - self.label_n

    @property
    def at_temperature_3n(self) -> Tensor:
        """What `pointwise` asks for: maximum, ln Σ at T, ln Σ at 1."""
        return torch.stack([self.maximum_n, self.log_warm_n, self.log_sum_n])

    @property
    def at_one_2n(self) -> Tensor:
        return torch.stack([self.maximum_n, self.log_sum_n])

    @classmethod
    def merged(cls, logits: Logits, told_gnS: Tensor) -> "Softmax":
        """The slices' statistics, of this rank's and all others', as one softmax."""
        maxima_gn, best_gn, label_gn, sum_gn, product_gn, warm_gn, *outside_gn = told_gnS.unbind(dim=2)
        maximum_n = maxima_gn.amax(dim=0)
        below_gn = maxima_gn - maximum_n
        shrink_gn = below_gn.exp()
        sum_n = (shrink_gn * sum_gn).sum(dim=0)
        warm_shrink_gn = (below_gn / logits.temperature).exp()
        # Σ e^y y of a slice is against its own maximum; -inf (a slice of nothing) is 0 times a number.
        product_n = (shrink_gn * (product_gn + below_gn.clamp_min(-1e30) * sum_gn)).sum(dim=0)
        return cls(
            logits=logits,
            maximum_n=maximum_n,
            best_n=torch.where(below_gn == 0, best_gn, math.inf).amin(dim=0),
            label_n=label_gn.sum(dim=0) - maximum_n,
            log_sum_n=sum_n.log(),
            entropy_n=sum_n.log() - product_n / sum_n,
            log_warm_n=(warm_shrink_gn * warm_gn).sum(dim=0).log(),
            log_outside_n=(warm_shrink_gn * outside_gn[0]).sum(dim=0).log() if outside_gn else None,
        )


@dataclass(frozen=True)
class Reading:
    """The softmaxes of a chunk, their small all-gather under way."""

    logits: tuple[Logits, ...]
    pending: Pending

    @classmethod
    def start(cls, logits: Sequence[Logits], label_rows_n: Tensor, vocab: VocabSlice, kept: Kept | None) -> "Reading":
        """Reads what this slice tells of each model and sends it off: one all-gather, however many models."""
        told = [each.statistics(label_rows_n, vocab) for each in logits]
        if kept is not None and kept.tail is Tail.OTHER:
            told.append(logits[0].outside(kept, told[0][:, 0]))
        return cls(tuple(logits), start_all_gather_rows(torch.cat(told, dim=1), vocab.group))

    def wait(self, vocab: VocabSlice) -> list[Softmax]:
        n = self.pending.source.shape[0]
        told = self.pending.wait().view(group_size(vocab.group), n, -1).chunk(len(self.logits), dim=2)
        return [Softmax.merged(each, told_gnS) for each, told_gnS in zip(self.logits, told, strict=True)]


def at_rows(z_nv: Tensor, rows: Tensor) -> Tensor:
    """The logit at a row of each token (`rows` [n], or [n, K] for several); 0 where another rank holds it (-1)."""
    if z_nv.shape[1] == 0:
        return z_nv.new_zeros(rows.shape)
    wanted = rows if rows.ndim == 2 else rows.unsqueeze(1)
    found = torch.where(wanted >= 0, z_nv.gather(1, wanted.clamp_min(0)), 0)
    return found.view(rows.shape)
