"""A chunk of tokens on one slice of the vocabulary: from the softmaxes to the terms of the loss and its slope.

It knows the softmax over the whole vocabulary, and what each kind of target asks of it; it does not know hidden states
or heads, nor what becomes of the slope.

Legend: g ranks of the vocab group; n tokens of a chunk (of the whole group), b of them in a block; v this rank's true
rows of the vocabulary; K ids kept of a token; T the temperature; p_t, p_s the distributions of teacher and student at
T; q the targets of kept ids; r_t, r_s what teacher and student hold outside of them; "slope": the derivative of the
loss by the student's products.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum, group_size
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import pointwise
from megadistill.loss.divergence import Divergence, DivergenceKind
from megadistill.loss.softmax import Kept, Softmax, at_rows
from megadistill.types import TOP_K, LogitTransform, Tail

SHARES = 3
"""What `write_slope` returns of a token, in parts that add up over the slices: divergence, forward KL, both weighted,
and the divergence as it counts in the loss."""

PAIRWISE = 4
"""What `pointwise.diagnostics` returns of a token: forward KL, reverse KL, JSD, acceptance."""


@dataclass(frozen=True)
class Tokens:
    """What the loss is told of the tokens of a chunk, apart from logits."""

    weights_n: Tensor
    labelled_n: Tensor
    """1 where a token has a label, 0 where it has none."""
    label_rows_n: Tensor
    """The label's row of this slice, -1 where another rank holds it."""
    kd_n: Tensor
    """What the divergence of a token is multiplied with in the loss."""
    ce_n: Tensor
    """What its cross-entropy is multiplied with."""


@dataclass(frozen=True)
class Chunk:
    """The tokens of a chunk with the student's softmax, and with the teacher's or its kept ids."""

    tokens: Tokens
    student: Softmax
    teacher: Softmax | None
    kept: Kept | None
    divergence: Divergence
    transform: LogitTransform
    """The student's."""
    vocab: VocabSlice

    def own_sums(self, own: slice) -> Tensor:
        """[10]: what every rank knows of a token whole, summed over the tokens `own`, weighted."""
        student, teacher, tokens = self.student, self.teacher, self.tokens
        nothing_n = torch.zeros_like(tokens.weights_n)
        labelled_ce_n = torch.where(tokens.labelled_n > 0, student.label_ce_n, 0)
        tail_n = self._other_value()
        weighted_8n = tokens.weights_n * torch.stack(
            [
                labelled_ce_n,
                torch.where(tokens.labelled_n > 0, teacher.label_ce_n, 0) if teacher else nothing_n,
                student.entropy_n,
                teacher.entropy_n if teacher else nothing_n,
                (teacher.best_n == student.best_n).to(nothing_n.dtype) if teacher else nothing_n,
                student.log_z_n,
                student.log_z_n.square(),
                tail_n,
            ]
        )
        in_loss_2n = torch.stack([tokens.ce_n * labelled_ce_n, tokens.kd_n * tail_n])
        return torch.cat([weighted_8n, in_loss_2n])[:, own].sum(dim=1)

    def write_slope(self, *, with_slope: bool) -> Tensor:
        """[n, SHARES] of this slice. The slope overwrites the student's logits, which nobody needs any more."""
        if self.teacher is not None:
            if self.divergence.formula is DivergenceKind.FORWARD_KL:
                value_n, kl_n = self._forward_kl(self.teacher, with_slope)
            else:
                value_n, kl_n = self._centred(self.teacher, with_slope)
        elif self.kept is not None:
            value_n = kl_n = self._kept_ids(self.kept, with_slope)
        else:
            value_n = kl_n = torch.zeros_like(self.tokens.weights_n)
            if with_slope:
                self._student_slope(kl_n)
        w_n = self.tokens.weights_n
        shares_n3 = torch.stack([w_n * value_n, w_n * kl_n, self.tokens.kd_n * value_n], dim=1)
        return shares_n3.masked_fill(w_n.unsqueeze(1) == 0, 0)  # reverse KL may be infinite, and 0 times that is NaN

    def diagnose(self) -> Tensor:
        """[n, PAIRWISE] of this slice. Reads the logits: call it before the slope is written."""
        assert self.teacher is not None
        logits, found_n4 = self.student.logits, self.tokens.weights_n.new_zeros(len(self.tokens.weights_n), PAIRWISE)
        stage = logits.stage(pointwise.diagnostics)
        student_2n, teacher_2n = self.student.at_one_2n, self.teacher.at_one_2n
        for rows in logits.blocks():
            found_n4[rows] = stage(
                logits.z_nv[rows], self.teacher.logits.z_nv[rows], student_2n[:, rows], teacher_2n[:, rows]
            )
        return found_n4

    def top_k_mass(self) -> Tensor:
        """[n, 3]: the teacher's mass on its `TOP_K` most likely ids, at temperature 1. Collective."""
        assert self.teacher is not None
        z_nv, most = self.teacher.logits.z_nv, max(TOP_K)
        best_nk = z_nv.topk(min(most, z_nv.shape[1]), dim=1).values
        best_nk = torch.nn.functional.pad(best_nk, (0, most - best_nk.shape[1]), value=-math.inf)
        n, g = len(best_nk), group_size(self.vocab.group)
        everyone_nk = all_gather_rows(best_nk, self.vocab.group).view(g, n, most).transpose(0, 1).flatten(1)
        best_nk = everyone_nk.topk(most, dim=1).values  # in descending order
        teacher_2n = self.teacher.at_one_2n
        mass_nk = pointwise.log_p(best_nk, teacher_2n[0], teacher_2n[1], 1.0).exp().cumsum(dim=1)
        return mass_nk[:, [k - 1 for k in TOP_K]]

    @property
    def _pull_n(self) -> Tensor | None:
        """What p_s at temperature 1 pulls at every id: d CE = p - onehot(label), d (ln Z)² = 2 ln Z · p."""
        d = self.divergence
        if d.ce_weight == d.z_loss == d.label_fraction == 0:
            return None
        return self.tokens.ce_n + 2 * d.z_loss * self.tokens.weights_n * self.student.log_z_n

    def _forward_kl(self, teacher: Softmax, with_slope: bool) -> tuple[Tensor, Tensor]:
        student, logits, T = self.student, self.student.logits, self.divergence.temperature
        stage, kl_n = logits.stage(pointwise.forward_kl), torch.zeros_like(self.tokens.weights_n)
        student_3n, teacher_2n, kd_n, pull_n = self._of_rows(teacher)
        label = self._label_slope() if with_slope else None
        for rows in logits.blocks():
            kl_n[rows] = stage(
                logits.z_nv[rows],
                teacher.logits.z_nv[rows],
                student_3n[:, rows],
                teacher_2n[:, rows],
                kd_n[rows],
                None if pull_n is None else pull_n[rows],
                T,
                self.transform.scale,
                self.transform.softcap,
                with_slope,
            )
        if label is not None:
            add_at_rows_(student.logits.z_nv, self.tokens.label_rows_n, label)
        return kl_n, kl_n

    def _centred(self, teacher: Softmax, with_slope: bool) -> tuple[Tensor, Tensor]:
        """The divergences whose slope is centred on Σ p_s g: one more small all-reduce, of a number a token."""
        logits, d = self.student.logits, self.divergence
        stage, found_n3 = logits.stage(pointwise.centred), self.tokens.weights_n.new_zeros(len(logits.z_nv), 3)
        student_3n, teacher_2n, kd_n, pull_n = self._of_rows(teacher)
        for rows in logits.blocks():
            block = (logits.z_nv[rows], teacher.logits.z_nv[rows], student_3n[:, rows], teacher_2n[:, rows])
            found_n3[rows] = stage(d.formula, *block, d.mixture, d.temperature)
        value_n, kl_n, centre_n = found_n3.unbind(dim=1)
        if with_slope:
            centre_n, label = all_reduce_sum(centre_n.contiguous(), self.vocab.group), self._label_slope()
            stage = logits.stage(pointwise.centred_slope)
            for rows in logits.blocks():
                block = (logits.z_nv[rows], teacher.logits.z_nv[rows], student_3n[:, rows], teacher_2n[:, rows])
                pull_b = None if pull_n is None else pull_n[rows]
                back = (self.transform.scale, self.transform.softcap)
                stage(d.formula, *block, centre_n[rows], kd_n[rows], pull_b, d.mixture, d.temperature, *back)
            add_at_rows_(logits.z_nv, self.tokens.label_rows_n, label)
        return value_n, kl_n

    def _kept_ids(self, kept: Kept, with_slope: bool) -> Tensor:
        """[n]: this slice's share of Σ q (ln q - ln p_s). The slope is p_s Σ q - q inside and p_s Σ q outside, with an
        "other" event p_s - q and p_s (1 - r_t/r_s); `_other_value` has that event's value, which no slice owns.
        """
        z_nv, T = self.student.logits.z_nv, self.divergence.temperature
        student_3n, q_nK, held_nK = self.student.at_temperature_3n, kept.probs_nK, kept.rows_nK >= 0
        picked_nK = at_rows(z_nv, kept.rows_nK)
        log_p_nK = (picked_nK - student_3n[0].unsqueeze(1)) / T - student_3n[1].unsqueeze(1)
        d_nK = torch.where(held_nK & (q_nK > 0), q_nK.log() - log_p_nK, 0)
        no_cancelling = kept.tail is Tail.OTHER  # whose targets add up to 1, as `kl_terms` asks
        share_nK = pointwise.kl_terms(q_nK, log_p_nK.exp(), d_nK) if no_cancelling else q_nK * d_nK
        if with_slope:
            outside_n, inside_n = self._kept_factors(kept)
            kd_n = self.tokens.kd_n / T
            push_nK = kd_n.unsqueeze(1) * (log_p_nK.exp() * (inside_n - outside_n).unsqueeze(1) - q_nK)
            push_nK = push_nK * pointwise.chain(picked_nK, self.transform.scale, self.transform.softcap)
            self._student_slope(kd_n * outside_n)
            add_at_rows_(z_nv, kept.rows_nK, push_nK)
        return torch.where(held_nK, share_nK, 0).sum(dim=1)

    def _kept_factors(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """[n] each: what p_s is multiplied with in the slope, outside and inside of the kept ids."""
        if kept.tail is not Tail.OTHER:
            mass_n = kept.probs_nK.sum(dim=1)
            return mass_n, mass_n
        log_r_t = kept.log_tail_n
        outside_n = torch.where(log_r_t > -math.inf, -torch.expm1(log_r_t - self._log_r_s()), 1)
        return outside_n, torch.ones_like(outside_n)

    def _other_value(self) -> Tensor:
        """[n]: the "other" event's part of the divergence, r_t (ln r_t - ln r_s), in the form that does not cancel."""
        if self.kept is None or self.kept.tail is not Tail.OTHER:
            return torch.zeros_like(self.tokens.weights_n)
        log_r_t, log_r_s = self.kept.log_tail_n, self._log_r_s()
        d_n = torch.where(log_r_t > -math.inf, log_r_t - log_r_s, 0)
        value_n = pointwise.kl_terms(log_r_t.exp(), log_r_s.exp(), d_n)
        return torch.where(log_r_t > -math.inf, value_n, log_r_s.exp())

    def _log_r_s(self) -> Tensor:
        assert self.student.log_outside_n is not None
        return self.student.log_outside_n - self.student.log_warm_n

    def _student_slope(self, kd_n: Tensor) -> None:
        """Writes kd · p_s plus the label's slope over the student's logits."""
        logits, stage = self.student.logits, self.student.logits.stage(pointwise.student_slope)
        student_3n, pull_n, label = self.student.at_temperature_3n, self._pull_n, self._label_slope()
        for rows in logits.blocks():
            stage(
                logits.z_nv[rows],
                student_3n[:, rows],
                kd_n[rows],
                None if pull_n is None else pull_n[rows],
                self.divergence.temperature,
                self.transform.scale,
                self.transform.softcap,
            )
        add_at_rows_(logits.z_nv, self.tokens.label_rows_n, label)

    def _label_slope(self) -> Tensor:
        """[n]: what the label itself is pushed up by. Reads its logit: call it before the slope is written."""
        z_n = at_rows(self.student.logits.z_nv, self.tokens.label_rows_n)
        return -self.tokens.ce_n * pointwise.chain(z_n, self.transform.scale, self.transform.softcap)

    def _of_rows(self, teacher: Softmax) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        kd_n = self.tokens.kd_n / self.divergence.temperature
        return self.student.at_temperature_3n, teacher.at_temperature_3n[:2], kd_n, self._pull_n


def add_at_rows_(z_nv: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds to the logit at a row of each token (`rows` [n] or [n, K]); nothing where another rank holds it (-1)."""
    if z_nv.shape[1] == 0:
        return
    wanted, added = (rows, values) if rows.ndim == 2 else (rows.unsqueeze(1), values.unsqueeze(1))
    z_nv.scatter_add_(1, wanted.clamp_min(0), torch.where(wanted >= 0, added, 0))
