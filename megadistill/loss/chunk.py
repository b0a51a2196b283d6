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
from megadistill.loss.exponential import kl_terms
from megadistill.loss.pointwise import Formula, GradCoefs, LabelCoefs, SoftmaxBlock
from megadistill.loss.softmax import Softmax, SparseSlice, add_at_rows_, at_rows, set_at_rows_
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

    def token_terms(self, own: slice) -> Tensor:
        """[10, tokens of `own`]: the terms that every rank has whole, each times its weight.

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
        return torch.cat([weighted_8n, in_loss_2n])[:, own]

    def write_dlogits(self, out_nv: Tensor | None) -> Tensor:
        """[n, SLICE_TERMS]: this slice's shares of the divergence, which add up over the slices.

        dlogits is written to `out_nv` [n, v], where there is one: to the memory of the student's logits, which nothing
        reads any more, or to another of the dtype that the products take.
        """
        if self.teacher is not None:
            forward = self.divergence.formula is DivergenceKind.FORWARD_KL
            value_n, kl_n = (self._forward_kl if forward else self._mean_centred)(self.teacher, out_nv)
        elif self.targets is not None:
            value_n = self._sparse_kl(self.targets, out_nv)
            kl_n = torch.zeros_like(value_n)  # that of the complete distributions, of which the targets hold a part
        else:
            value_n = kl_n = torch.zeros_like(self.tokens.weights_n)
            if out_nv is not None:
                self._write_student_dlogits(self._coefs._replace(kd_b=kl_n), out_nv)
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
        return torch.stack([mass_nk[:, k - 1] for k in TOP_K], dim=1)  # a list of columns is copied to the device

    @property
    def _coefs(self) -> GradCoefs:
        """[n]. The gradient of CE is p_s - onehot(label), that of (ln Z)² is 2 ln Z · p_s, both at temperature 1.

        Reads the label's logit: call it before dlogits is written.
        """
        d, tokens, label = self.divergence, self.tokens, None
        if d.ce_weight or d.z_loss or d.label_fraction:
            z_nv = self.student.logits.z_nv
            z_n = at_rows(z_nv, tokens.label_rows_n)
            label = LabelCoefs(
                p_s_b=tokens.ce_n + 2 * d.z_loss * tokens.weights_n * self.student.log_z_n,
                onehot_b=pointwise.through_transform(-tokens.ce_n, z_n, self.transform),
                row_b=tokens.label_rows_n.to(z_nv.dtype),
                rows_v=torch.arange(z_nv.shape[1], dtype=z_nv.dtype, device=z_nv.device),
            )
        return GradCoefs(tokens.kd_n / d.temperature, label)

    def _forward_kl(self, teacher: Softmax, out_nv: Tensor | None) -> tuple[Tensor, Tensor]:
        student, logits, kl_n = self.student, self.student.logits, torch.zeros_like(self.tokens.weights_n)
        kernel, T = logits.kernel(pointwise.forward_kl), self.divergence.temperature
        coefs = None if out_nv is None else self._coefs
        for rows in logits.blocks():
            coefs_b, block = None if coefs is None else _block(coefs, rows), student.block(rows)
            out_bv = None if out_nv is None else self._out(out_nv, block, rows)
            kl_n[rows] = kernel(block, teacher.block(rows), T, coefs_b, self.transform, out_bv)
        return kl_n, kl_n

    def _mean_centred(self, teacher: Softmax, out_nv: Tensor | None) -> tuple[Tensor, Tensor]:
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
        if out_nv is not None:
            mean_n = all_reduce_sum(mean_n.contiguous(), self.vocab.group)
            kernel, coefs = logits.kernel(pointwise.write_mean_centred_dlogits), self._coefs
            for rows in logits.blocks():
                block, coefs_b = student.block(rows), _block(coefs, rows)
                out_bv = self._out(out_nv, block, rows)
                kernel(block, teacher.block(rows), formula, mean_n[rows], coefs_b, self.transform, out_bv)
        return value_n, kl_n

    def _sparse_kl(self, targets: SparseSlice, out_nv: Tensor | None) -> Tensor:
        """[n]: this slice's share of Σ q (ln q - ln p_s) over the target ids.

        Its derivative is p_s Σ q - q at target ids and p_s Σ q elsewhere; with a tail of its own p_s - q and
        p_s (1 - r_t/r_s). The tail's own value, which no slice owns, is `_tail_divergence`.
        """
        T, (_, *stats) = self.divergence.temperature, self.student.block(slice(None))
        q_nK, own_nK = targets.probs_nK, targets.rows_nK >= 0
        at_targets = SoftmaxBlock(at_rows(self.student.logits.z_nv, targets.rows_nK), *stats)
        log_p_nK = pointwise.log_p_T(at_targets, T)
        d_nK = torch.where(own_nK & (q_nK > 0), q_nK.log() - log_p_nK, 0)
        sums_to_one = targets.tail is Tail.OTHER  # as `kl_terms` needs it
        share_nK = kl_terms(q_nK, log_p_nK.exp(), d_nK) if sums_to_one else q_nK * d_nK
        if out_nv is not None:
            outside_n, inside_n = self._sparse_factors(targets)
            coefs = self._coefs
            dz_nK = coefs.kd_b.unsqueeze(1) * (log_p_nK.exp() * (inside_n - outside_n).unsqueeze(1) - q_nK)
            dz_nK = pointwise.through_transform(dz_nK, at_targets.z_bv, self.transform)
            coefs = coefs._replace(kd_b=coefs.kd_b * outside_n)
            self._write_student_dlogits(coefs, out_nv)
            if out_nv.dtype == dz_nK.dtype:
                add_at_rows_(out_nv, targets.rows_nK, dz_nK)
            else:  # a sum of two rounded numbers that cancel would be wrong: what is there is computed once more
                if coefs.label is not None:
                    coefs = coefs._replace(label=coefs.label._replace(rows_v=targets.rows_nK))
                written_nK = pointwise.student_dlogits(at_targets, T, coefs, self.transform)
                set_at_rows_(out_nv, targets.rows_nK, written_nK + dz_nK)
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
        value_n = kl_terms(log_r_t.exp(), log_r_s.exp(), d_n)
        return torch.where(log_r_t > -math.inf, value_n, log_r_s.exp())

    def _log_r_s(self) -> Tensor:
        assert self.student.log_tail_sum_T_n is not None
        return self.student.log_tail_sum_T_n - self.student.log_sum_T_n

    def _write_student_dlogits(self, coefs: GradCoefs, out_nv: Tensor) -> None:
        """Writes kd · p_s plus the part of cross-entropy and z-loss."""
        logits, T = self.student.logits, self.divergence.temperature
        kernel = logits.kernel(pointwise.write_student_dlogits)
        for rows in logits.blocks():
            block = self.student.block(rows)
            kernel(block, T, _block(coefs, rows), self.transform, self._out(out_nv, block, rows))

    def _out(self, out_nv: Tensor, block: SoftmaxBlock, rows: slice) -> Tensor:
        """[b, v]: the rows of `out_nv`; as the block's own tensor where dlogits overwrites the student's logits.

        A compiled kernel that is given one memory as two tensors would copy all memory of logits, at each call.
        """
        return block.z_bv if out_nv is self.student.logits.z_nv else out_nv[rows]


def _block(coefs: GradCoefs, rows: slice) -> GradCoefs:
    kd_n, label = coefs
    if label is not None:
        label = LabelCoefs(label.p_s_b[rows], label.onehot_b[rows], label.row_b[rows], label.rows_v)
    return GradCoefs(kd_n[rows], label)
