"""A chunk of tokens on one slice of the vocabulary: from both models' logits to the terms of the loss and its slope.

It knows logits, the softmax over the whole vocabulary and the one small all-gather that it takes; it does not know
hidden states or heads, nor what becomes of the slope.

Legend: g ranks of the vocab group; n tokens of a chunk (of the whole group), b of them in a block; v this rank's true
rows of the vocabulary; T the temperature; Q temperatures (1, and T where it differs); S = 3 + Q statistics of a slice;
p_t, p_s the distributions of teacher and student; "slope": the derivative of the loss by the student's logits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.comm.collectives import all_gather_rows, group_size
from megadistill.comm.vocabulary import VocabSlice
from megadistill.loss.divergence import Divergence
from megadistill.records import IGNORED_LABEL

BLOCK_ELEMENTS = 1 << 18
"""Elementwise work goes over blocks of about this many logits: its temporaries stay small, and in a CPU's cache."""


@dataclass(frozen=True)
class Softmax:
    """One model's softmax over the whole vocabulary, for the tokens of a chunk, seen from this rank's slice.

    Sums are kept apart from maxima: what is left is below the maximum, so that a constant added to a row of logits
    changes nothing, however large it is.
    """

    logits_nv: Tensor
    maximum_n: Tensor
    best_n: Tensor
    """The most likely id; the lowest where several are."""
    label_n: Tensor
    """The label's logit, less the maximum."""
    log_sum_n: dict[float, Tensor]
    """ln Σ e^((z - maximum)/τ), for each temperature τ."""

    @property
    def log_z_n(self) -> Tensor:
        return self.maximum_n + self.log_sum_n[1.0]

    @property
    def label_ce_n(self) -> Tensor:
        return self.log_sum_n[1.0] - self.label_n

    def log_p(self, rows: slice, temperature: float) -> Tensor:
        """[b, v]: ln p of a block of rows, on this slice."""
        below_bv = self.logits_nv[rows] - self.maximum_n[rows].unsqueeze(1)
        return below_bv.div_(temperature).sub_(self.log_sum_n[temperature][rows].unsqueeze(1))


@dataclass(frozen=True)
class Chunk:
    """The tokens of a chunk with the softmax of both models; `finish` then turns them into terms and slope."""

    student: Softmax
    teacher: Softmax | None
    divergence: Divergence
    weights_n: Tensor
    labelled_n: Tensor
    """1 where a token has a label, 0 where it has none."""
    label_rows_n: Tensor
    """The label's row of this slice, -1 where another rank holds it."""

    @classmethod
    def read(
        cls, logits: Sequence[Tensor], *, labels_n: Tensor, weights_n: Tensor, divergence: Divergence, vocab: VocabSlice
    ) -> "Chunk":
        """Reads the logits [n, v] of the student, and of the teacher if there is one. One small all-gather."""
        g, n, v = group_size(vocab.group), labels_n.shape[0], vocab.true_rows
        temperatures = tuple(dict.fromkeys((1.0, divergence.temperature)))
        label_rows_n, ids_v = vocab.local_rows(labels_n), vocab.global_ids(labels_n.device)[:v]
        statistics = [
            torch.cat([_statistics(z[rows], label_rows_n[rows], ids_v, temperatures) for rows in _row_blocks(n, v)])
            for z in logits
        ]
        everyone_gnS = all_gather_rows(torch.cat(statistics, dim=1), vocab.group).view(g, n, -1).chunk(len(logits), 2)
        softmaxes = [_merged(z, told_gnS, temperatures) for z, told_gnS in zip(logits, everyone_gnS, strict=True)]
        return cls(
            student=softmaxes[0],
            teacher=softmaxes[1] if len(softmaxes) == 2 else None,
            divergence=divergence,
            weights_n=weights_n,
            labelled_n=(labels_n != IGNORED_LABEL).to(weights_n.dtype),
            label_rows_n=label_rows_n,
        )

    def token_sums(self, own: slice) -> Tensor:
        """[5]: student CE, teacher CE, agreement, log Z and (log Z)² of the tokens `own`, weighted."""
        student, teacher, nothing_n = self.student, self.teacher, torch.zeros_like(self.weights_n)
        terms_5n = torch.stack(
            [
                student.label_ce_n * self.labelled_n,
                teacher.label_ce_n * self.labelled_n if teacher else nothing_n,
                (teacher.best_n == student.best_n).to(nothing_n.dtype) if teacher else nothing_n,
                student.log_z_n,
                student.log_z_n.square(),
            ]
        )
        return terms_5n[:, own] @ self.weights_n[own]

    def finish(self, *, with_slope: bool) -> Tensor:
        """[n, 2]: this slice's share of KL and teacher entropy, weighted. The slope overwrites the student's logits."""
        n, v = self.student.logits_nv.shape
        shares_n2 = self.weights_n.new_zeros(n, 2)
        for rows in _row_blocks(n, v) if v > 0 else ():
            kl_slope_bv = None
            if self.teacher is not None:
                shares_n2[rows], kl_slope_bv = self._teacher_terms(self.teacher, rows)
            if with_slope:
                self._write_slope(rows, kl_slope_bv)
        return shares_n2 * self.weights_n.unsqueeze(1)

    def _teacher_terms(self, teacher: Softmax, rows: slice) -> tuple[Tensor, Tensor]:
        """Shares of KL and teacher entropy [b, 2], and the KL's derivative by the student's logits over T [b, v]."""
        T = self.divergence.temperature
        log_p_t_bv = teacher.log_p(rows, T)
        kl_b, kl_slope_bv = _forward_kl(log_p_t_bv, self.student.log_p(rows, T))
        if T != 1.0:
            log_p_t_bv = teacher.log_p(rows, 1.0)
        entropy_b = -(log_p_t_bv.exp() * log_p_t_bv).sum(dim=1)
        return torch.stack([kl_b, entropy_b], dim=1), kl_slope_bv

    def _write_slope(self, rows: slice, kl_slope_bv: Tensor | None) -> None:
        """Over the student's logits, which nobody needs any more. d CE = p - onehot(label), d (ln Z)² = 2 ln Z · p."""
        d, weights_b, label_rows_b = self.divergence, self.weights_n[rows], self.label_rows_n[rows]
        slope_bv = self.student.logits_nv[rows]
        pull_b = weights_b * (d.ce_weight * self.labelled_n[rows] + 2 * d.z_loss * self.student.log_z_n[rows])
        torch.mul(self.student.log_p(rows, 1.0).exp_(), pull_b.unsqueeze(1), out=slope_bv)
        push_b = torch.where(label_rows_b >= 0, -d.ce_weight * weights_b, 0)
        slope_bv.scatter_add_(1, label_rows_b.clamp_min(0).unsqueeze(1), push_b.unsqueeze(1))
        if kl_slope_bv is not None:
            slope_bv.addcmul_(kl_slope_bv, (d.kd_factor / d.temperature * weights_b).unsqueeze(1))


def _statistics(logits_bv: Tensor, label_rows_b: Tensor, ids_v: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """[b, S]: what a slice tells of a block: maximum, its id, the label's logit (0 where others hold it), the sums.

    An empty slice tells a maximum of -inf and sums of 0.
    """
    if ids_v.numel() == 0:
        nothing_S = logits_bv.new_tensor([-math.inf, math.inf, 0.0, *(0.0 for _ in temperatures)])
        return nothing_S.expand(logits_bv.shape[0], -1)
    maximum_b, row_b = logits_bv.max(dim=1)  # the first of equals, which is the lowest id: ranges ascend
    label_b = logits_bv.gather(1, label_rows_b.clamp_min(0).unsqueeze(1)).squeeze(1)
    label_b = torch.where(label_rows_b >= 0, label_b, 0)
    below_bv = logits_bv - maximum_b.unsqueeze(1)
    sums = [(below_bv / temperature).exp_().sum(dim=1) for temperature in temperatures]
    return torch.stack([maximum_b, ids_v[row_b].to(maximum_b.dtype), label_b, *sums], dim=1)


def _merged(logits_nv: Tensor, statistics_gnS: Tensor, temperatures: tuple[float, ...]) -> Softmax:
    maxima_gn, best_gn, label_gn, *sums = statistics_gnS.unbind(dim=2)
    maximum_n = maxima_gn.amax(dim=0)
    below_gn = maxima_gn - maximum_n
    return Softmax(
        logits_nv=logits_nv,
        maximum_n=maximum_n,
        best_n=torch.where(below_gn == 0, best_gn, math.inf).amin(dim=0),
        label_n=label_gn.sum(dim=0) - maximum_n,
        log_sum_n={
            temperature: ((below_gn / temperature).exp() * sum_gn).sum(dim=0).log()
            for temperature, sum_gn in zip(temperatures, sums, strict=True)
        },
    )


def _forward_kl(log_p_t_bv: Tensor, log_p_s_bv: Tensor) -> tuple[Tensor, Tensor]:
    """This slice's share of KL(p_t ‖ p_s) [b], and its derivative by the student's logits over T, p_s - p_t [b, v].

    With d = ln p_t - ln p_s the share is Σ p_t (d + expm1(-d)). Over the whole vocabulary that adds Σ p_s - Σ p_t = 0
    to the textbook sum; but every term is positive, and nothing cancels when the student is near the teacher. Where
    the student holds an id far likelier than the teacher does, expm1 would overflow and the plain sum is exact enough.
    """
    d_bv = log_p_t_bv - log_p_s_bv
    p_t_bv = log_p_t_bv.exp()
    slope_bv = log_p_s_bv.exp() - p_t_bv
    share_bv = torch.where(d_bv > -1, p_t_bv * (d_bv + torch.expm1(-d_bv)), p_t_bv * d_bv + slope_bv)
    return share_bv.sum(dim=1), slope_bv


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
