"""A chunk of tokens on one slice of the vocabulary: from the softmaxes to the terms of the loss and to dlogits.

Legend: g ranks of the vocab group; n tokens of a chunk (of the whole group), b of them in a block; v this rank's true
rows of the vocabulary; K sparse target ids of a token; T the temperature; p_t, p_s the distributions of teacher and
student at T; q the probabilities of sparse targets; r_t, r_s the tails: what teacher and student give to all other ids;
dlogits: the derivative of the loss with respect to the student's products x Wᵀ.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum, group_size
from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence, DivergenceKind
from megadistill.loss import pointwise
from megadistill.loss.pointwise import Formula, GradCoefs, SoftmaxBlock
from megadistill.loss.softmax import Softmax, SparseSlice, add_at_rows_, at_rows
from megadistill.types import TOP_K, LogitTransform, Tail

SLICE_TERMS = 3
"""Columns of `write_dlogits`: divergence and forward KL, both weighted, and the divergence as it counts in the loss."""

PAIRWISE_TERMS = 4
"""Columns of `pointwise.pairwise_terms`: forward KL, reverse KL, JSD, acceptance."""


@dataclass(frozen=True)
class Tokens:
    """Labels and weights of the tokens of a chunk."""

    weights_n: Tensor
    has_label_n: Tensor
    """1 where a token has a label, else 0."""
    label_rows_n: Tensor
    """The label's row of this slice, -1 where another rank holds it."""
    kd_n: Tensor
    """The factor of a token's divergence in the loss."""
    ce_n: Tensor
    """The factor of its cross-entropy."""


@dataclass(frozen=True)
class Chunk:
    """The tokens of a chunk with the student's softmax, and with the teacher's or with sparse targets."""

    tokens: Tokens
    student: Softmax
    teacher: Softmax | None
    targets: SparseSlice | None
    divergence: Divergence
    transform: LogitTransform
    """The student's."""
    vocab: VocabSlice

    def token_sums(self, own: slice) -> Tensor:
        """[10]: sums over the tokens `own` of the terms that every rank has whole, each times its weight.

        CE of student and teacher, entropy of both, agreement, ln Z, (ln Z)², the tail's part of the divergence; then CE
        and the tail's part as they count in the loss.
        """
        student, teacher, tokens = self.student, self.teacher, self.tokens
        zero_n = torch.zeros_like(tokens.weights_n)
        student_ce_n = torch.where(tokens.has_label_n > 0, student.label_ce_n, 0)
        tail_n = self._tail_divergence()
        weighted_8n = tokens.weights_n * torch.stack(
            [
                student_ce_n,
                torch.where(tokens.has_label_n > 0, teacher.label_ce_n, 0) if teacher else zero_n,
                student.entropy_n,
                teacher.entropy_n if teacher else zero_n,
                (teacher.argmax_n == student.argmax_n).to(zero_n.dtype) if teacher else zero_n,
                student.log_z_n,
                student.log_z_n.square(),
                tail_n,
            ]
        )
        in_loss_2n = torch.stack([tokens.ce_n * student_ce_n, tokens.kd_n * tail_n])
        return torch.cat([weighted_8n, in_loss_2n])[:, own].sum(dim=1)

    def write_dlogits(self, *, with_gradient: bool) -> Tensor:
        """[n, SLICE_TERMS]: this slice's shares of the divergence, which add up over the slices.

        With a gradient, dlogits overwrites the student's logits, which nothing reads any more.
        """
        if self.teacher is not None:
            forward = self.divergence.formula is DivergenceKind.FORWARD_KL
            value_n, kl_n = (self._forward_kl if forward else self._mean_centred)(self.teacher, with_gradient)
        elif self.targets is not None:
            value_n = self._sparse_kl(self.targets, with_gradient)
            kl_n = torch.zeros_like(value_n)  # that of the complete distributions, of which the targets hold a part
        else:
            value_n = kl_n = torch.zeros_like(self.tokens.weights_n)
            if with_gradient:
                self._write_student_dlogits(self._coefs._replace(kd_b=kl_n))
        w_n = self.tokens.weights_n
        terms_n3 = torch.stack([w_n * value_n, w_n * kl_n, self.tokens.kd_n * value_n], dim=1)
        return terms_n3.masked_fill(w_n.unsqueeze(1) == 0, 0)  # reverse KL may be infinite, and 0 times that is NaN

    def pairwise_terms(self) -> Tensor:
        """[n, PAIRWISE_TERMS]: this slice's shares. Reads the logits: call it before dlogits is written."""
        assert self.teacher is not None
        logits, terms_n4 = self.student.logits, self.tokens.weights_n.new_zeros(len(self.tokens.weights_n), 4)
        kernel = logits.kernel(pointwise.pairwise_terms)
        for rows in logits.blocks():
            terms_n4[rows] = kernel(self.student.block(rows), self.teacher.block(rows))
        return terms_n4

    def top_k_mass(self) -> Tensor:
        """[n, 3]: the teacher's mass on its `TOP_K` most likely ids, at temperature 1. Collective."""
        assert self.teacher is not None
        z_nv, most = self.teacher.logits.z_nv, max(TOP_K)
        top_nk = z_nv.topk(min(most, z_nv.shape[1]), dim=1).values
        top_nk = pad(top_nk, (0, most - top_nk.shape[1]), value=-math.inf)
        n, g = len(top_nk), group_size(self.vocab.group)
        gathered_nk = all_gather_rows(top_nk, self.vocab.group).view(g, n, most).transpose(0, 1).flatten(1)
        top_nk = gathered_nk.topk(most, dim=1).values  # in descending order
        _, *stats = self.teacher.block(slice(None))
        mass_nk = pointwise.log_p(SoftmaxBlock(top_nk, *stats)).exp().cumsum(dim=1)
        return mass_nk[:, [k - 1 for k in TOP_K]]

    @property
    def _coefs(self) -> GradCoefs:
        """[n]. The gradient of CE is p_s - onehot(label), that of (ln Z)² is 2 ln Z · p_s, both at temperature 1."""
        d, kd_n, ce_n = self.divergence, self.tokens.kd_n / self.divergence.temperature, None
        if d.ce_weight or d.z_loss or d.label_fraction:
            ce_n = self.tokens.ce_n + 2 * d.z_loss * self.tokens.weights_n * self.student.log_z_n
        return GradCoefs(kd_n, ce_n)

    def _forward_kl(self, teacher: Softmax, with_gradient: bool) -> tuple[Tensor, Tensor]:
        student, logits, kl_n = self.student, self.student.logits, torch.zeros_like(self.tokens.weights_n)
        kernel, T, coefs = logits.kernel(pointwise.forward_kl), self.divergence.temperature, self._coefs
        label_n = self._label_dlogits() if with_gradient else None
        for rows in logits.blocks():
            coefs_b = _block(coefs, rows) if with_gradient else None
            kl_n[rows] = kernel(student.block(rows), teacher.block(rows), T, coefs_b, self.transform)
        if label_n is not None:
            add_at_rows_(logits.z_nv, self.tokens.label_rows_n, label_n)
        return kl_n, kl_n

    def _mean_centred(self, teacher: Softmax, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """The divergences whose dlogits subtract the mean Σ p_s g: one more small all-reduce, of a number a token."""
        student, logits, d = self.student, self.student.logits, self.divergence
        formula = Formula(d.formula, d.temperature, d.share)
        kernel, terms_n3 = (
            logits.kernel(pointwise.mean_centred_stats),
            self.tokens.weights_n.new_zeros(len(logits.z_nv), 3),
        )
        for rows in logits.blocks():
            terms_n3[rows] = kernel(student.block(rows), teacher.block(rows), formula)
        value_n, kl_n, mean_n = terms_n3.unbind(dim=1)
        if with_gradient:
            mean_n, label_n = all_reduce_sum(mean_n.contiguous(), self.vocab.group), self._label_dlogits()
            kernel, coefs = logits.kernel(pointwise.write_mean_centred_dlogits), self._coefs
            for rows in logits.blocks():
                blocks = (student.block(rows), teacher.block(rows))
                kernel(*blocks, formula, mean_n[rows], _block(coefs, rows), self.transform)
            add_at_rows_(logits.z_nv, self.tokens.label_rows_n, label_n)
        return value_n, kl_n

    def _sparse_kl(self, targets: SparseSlice, with_gradient: bool) -> Tensor:
        """[n]: this slice's share of Σ q (ln q - ln p_s) over the target ids.

        Its derivative is p_s Σ q - q at target ids and p_s Σ q elsewhere; with a tail of its own p_s - q and
        p_s (1 - r_t/r_s). The tail's own value, which no slice owns, is `_tail_divergence`.
        """
        z_nv, T, student = self.student.logits.z_nv, self.divergence.temperature, self.student
        q_nK, own_nK = targets.probs_nK, targets.rows_nK >= 0
        z_nK = at_rows(z_nv, targets.rows_nK)
        _, *stats = student.block(slice(None))
        log_p_nK = pointwise.log_p_T(SoftmaxBlock(z_nK, *stats), T)
        d_nK = torch.where(own_nK & (q_nK > 0), q_nK.log() - log_p_nK, 0)
        sums_to_one = targets.tail is Tail.OTHER  # as `kl_terms` needs it
        share_nK = pointwise.kl_terms(q_nK, log_p_nK.exp(), d_nK) if sums_to_one else q_nK * d_nK
        if with_gradient:
            outside_n, inside_n = self._sparse_factors(targets)
            coefs = self._coefs
            dz_nK = coefs.kd_b.unsqueeze(1) * (log_p_nK.exp() * (inside_n - outside_n).unsqueeze(1) - q_nK)
            dz_nK = dz_nK * pointwise.transform_grad(z_nK, self.transform)
            self._write_student_dlogits(coefs._replace(kd_b=coefs.kd_b * outside_n))
            add_at_rows_(z_nv, targets.rows_nK, dz_nK)
        return torch.where(own_nK, share_nK, 0).sum(dim=1)

    def _sparse_factors(self, targets: SparseSlice) -> tuple[Tensor, Tensor]:
        """[n] each: the factors of p_s in dlogits, at ids that are not targets and at those that are."""
        if targets.tail is not Tail.OTHER:
            mass_n = targets.probs_nK.sum(dim=1)
            return mass_n, mass_n
        log_r_t = targets.log_tail_n
        outside_n = torch.where(log_r_t > -math.inf, -torch.expm1(log_r_t - self._log_r_s()), 1)
        return outside_n, torch.ones_like(outside_n)

    def _tail_divergence(self) -> Tensor:
        """[n]: the tail's part of the divergence, r_t (ln r_t - ln r_s), in the form that does not cancel."""
        if self.targets is None or self.targets.tail is not Tail.OTHER:
            return torch.zeros_like(self.tokens.weights_n)
        log_r_t, log_r_s = self.targets.log_tail_n, self._log_r_s()
        d_n = torch.where(log_r_t > -math.inf, log_r_t - log_r_s, 0)
        value_n = pointwise.kl_terms(log_r_t.exp(), log_r_s.exp(), d_n)
        return torch.where(log_r_t > -math.inf, value_n, log_r_s.exp())

    def _log_r_s(self) -> Tensor:
        assert self.student.log_tail_sum_T_n is not None
        return self.student.log_tail_sum_T_n - self.student.log_sum_T_n

    def _write_student_dlogits(self, coefs: GradCoefs) -> None:
        """Overwrites the student's logits with kd · p_s plus the part of cross-entropy and z-loss."""
        logits, label_n = self.student.logits, self._label_dlogits()
        kernel, T = logits.kernel(pointwise.write_student_dlogits), self.divergence.temperature
        for rows in logits.blocks():
            kernel(self.student.block(rows), T, _block(coefs, rows), self.transform)
        add_at_rows_(logits.z_nv, self.tokens.label_rows_n, label_n)

    def _label_dlogits(self) -> Tensor:
        """[n]: the label's own part of dlogits. Reads its logit: call it before dlogits is written."""
        z_n = at_rows(self.student.logits.z_nv, self.tokens.label_rows_n)
        return -self.tokens.ce_n * pointwise.transform_grad(z_n, self.transform)


def _block(coefs: GradCoefs, rows: slice) -> GradCoefs:
    return GradCoefs(coefs.kd_b[rows], None if coefs.ce_b is None else coefs.ce_b[rows])
