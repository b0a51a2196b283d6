"""The vocabulary-parallel loss: LM heads, divergence and gradient in one pass, a chunk of tokens at a time.

Every rank of the vocab group has its own tokens X [N, D] and its own rows W [w, D] of the heads, as in Megatron's
vocab-parallel cross-entropy. The hidden states are gathered over the group chunk by chunk, so logits exist for a chunk
of tokens and a slice of the vocabulary only. The gradient is computed in the forward pass, by hand: no collective is
ever differentiated, which is how such losses come to be wrong by a factor of the group's size.

`loss/reference.py` defines the values, docs/loss.md derives them.

Legend: N this rank's tokens, L those of the rank that has most; g ranks of the vocab group; D student width, E teacher
width; w this rank's rows of the vocabulary, v of them true (not padding); K sparse target ids of a token.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_reduce_sum, group_rank, group_size
from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence
from megadistill.loss.chunk import SLICE_TERMS
from megadistill.loss.diagnostics import DiagnosticsAccumulator, ascending_places, unpacked
from megadistill.loss.gradients import Gradients
from megadistill.loss.heads import Head
from megadistill.loss.in_flight import GroupTokens, iter_chunks
from megadistill.loss.inputs import ChunkPlan, LossInputs, exchange_metadata
from megadistill.loss.options import LossOptions
from megadistill.loss.reference import require_sparse
from megadistill.types import IGNORED_LABEL, METRIC_NAMES, LossTerms, SparseTargets


def distill_loss(
    student: Head,
    teacher: Head,
    labels: Tensor,
    *,
    token_weights: Tensor,
    divergence: Divergence,
    vocab: VocabSlice,
    options: LossOptions = LossOptions(),
) -> LossTerms:
    """`divergence` of student against teacher, summed over this rank's tokens, each times its weight.

    Collective over `vocab.group`: every rank passes its own N tokens (N may differ, and may be 0) and its own rows of
    both heads, and either all of them want gradients or none does. `LossTerms.loss` belongs to this rank's tokens; the
    gradients are those of the sum of the losses over the group, so call backward with the same upstream gradient on
    every rank, once. Where no gradient is wanted (grad mode off, or nothing requires one) only the values are computed.

    Args:
        student: hidden [N, D], weight [w, D]. The weight's gradient is complete without a collective, and float32 where
            `weight.grad_dtype` says so; that of padding rows is zero. The bias gets a gradient too.
        teacher: hidden [N, E], weight [w', E] for the same ids; its padding may be another (w' ≥ v). It gets no
            gradient. A bias of -inf marks an id that the teacher does not know (reverse KL is then infinite).
        labels: [N] int64 global ids, or `IGNORED_LABEL`: no cross-entropy for that token; its other terms count.
        token_weights: [N]. With weights 1/(tokens of the step) the terms are means. A token of weight 0 contributes
            nothing, whatever its hidden states hold.
        divergence: the terms of the loss and their weights.
        vocab: which rows of the vocabulary this rank holds; slices may be uneven, empty or block-cyclic.
        options: memory, compiled or eager arithmetic, diagnostics.

    Returns:
        `LossTerms` in nats, float32 (float64 for float64): `loss` differentiable, the others detached.

    Raises:
        ValueError: shapes, dtypes or labels that do not fit, slices that do not add up to the vocabulary, or ranks that
            disagree about gradients.
    """
    return _loss(LossInputs(student, teacher, labels, token_weights, divergence, vocab, options))


def label_loss(
    student: Head,
    labels: Tensor,
    *,
    token_weights: Tensor,
    vocab: VocabSlice,
    z_loss: float = 0.0,
    options: LossOptions = LossOptions(),
) -> LossTerms:
    """Cross-entropy against the labels plus `z_loss · (ln Z)²`: `distill_loss` without a teacher (its terms are 0)."""
    divergence = Divergence(kd_weight=0.0, ce_weight=1.0, z_loss=z_loss)
    return _loss(LossInputs(student, None, labels, token_weights, divergence, vocab, options))


def sparse_distill_loss(
    student: Head,
    targets: SparseTargets,
    labels: Tensor,
    *,
    token_weights: Tensor,
    divergence: Divergence,
    vocab: VocabSlice,
    options: LossOptions = LossOptions(),
) -> LossTerms:
    """Forward KL against a part of the teacher's distribution, plus cross-entropy and z-loss.

    `distill_loss` with `targets` in the teacher's place: `divergence` of the terms is that against the targets; `kl`
    and the other terms of the teacher's complete distribution are 0. Which targets are biased, and how: docs/loss.md.

    Args:
        targets: those of this rank's N tokens. K may differ between ranks.

    Raises:
        ValueError: as in `distill_loss`; another divergence than forward KL, targets of another temperature, or ids
            outside the vocabulary.
    """
    require_sparse(divergence, targets)
    return _loss(LossInputs(student, None, labels, token_weights, divergence, vocab, options, targets))


def _loss(inputs: LossInputs) -> LossTerms:
    student = inputs.student
    trainable = [t for t in (student.hidden, student.weight, student.bias) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and trainable:
        loss, metrics, per_token = _GradientInForward.apply(  # type: ignore[no-untyped-call]
            student.hidden, student.weight, student.bias, inputs
        )
    else:
        loss, metrics, per_token, _ = _forward(inputs, with_gradient=False)
    diagnostics = unpacked(metrics[8:]) if inputs.diagnostics else None
    scalars = dict(zip(METRIC_NAMES, (loss, *metrics[:8].unbind()), strict=True))
    return LossTerms(**scalars, diagnostics=diagnostics, per_token=per_token)


class _GradientInForward(torch.autograd.Function):
    """The forward pass computes the gradients; the backward pass multiplies them by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_wD: Tensor, bias_w: Tensor | None, inputs: LossInputs
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        loss, metrics, per_token, ctx.gradients = _forward(inputs, with_gradient=True)
        ctx.accumulates = inputs.student.weight_gradient is not None
        # Only a leaf can ask for a gradient of another dtype (a bf16 parameter that accumulates in float32).
        ctx.weight_grad_dtype = (weight_wD.grad_dtype if weight_wD.is_leaf else None) or weight_wD.dtype
        ctx.mark_non_differentiable(*(values for values in (metrics, per_token) if values is not None))
        return loss, metrics, per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss has been through backward already, and its gradients went with that; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a scaled copy of the float32 head gradient would be as large as the head.
        weight_grad_wD = None if ctx.accumulates else gradients.weight_wD.mul_(upstream).to(ctx.weight_grad_dtype)
        bias_grad_w = None if gradients.bias_w is None else gradients.bias_w.mul_(upstream)
        return gradients.hidden_ND.mul_(upstream), weight_grad_wD, bias_grad_w, None


@torch.no_grad()
def _forward(inputs: LossInputs, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None, Gradients | None]:
    """The whole computation: loss, metrics, `LossTerms.per_token`, gradients. Collective over the vocab group.

    Metrics are [8]: the other scalars of `LossTerms`, in order; [24] with those of `Diagnostics` behind them.
    """
    group = inputs.vocab.group
    g, rank = group_size(group), group_rank(group)

    # Once a call: shapes and checks (the only host-device sync), then labels and weights of the group's tokens.
    plan, K = exchange_metadata(inputs, with_gradient=with_gradient)
    tokens = GroupTokens.gather(inputs, plan)
    if inputs.divergence.label_fraction > 0:
        tokens = replace(tokens, use_label_gL=_lowest_entropy(inputs, plan, tokens))

    gradients = Gradients.empty(inputs, plan) if with_gradient else None
    diagnostics = DiagnosticsAccumulator.zeros(tokens.weights_gL) if inputs.diagnostics else None
    each = PerToken.zeros(tokens.weights_gL) if inputs.options.per_token else None
    token_sums = tokens.weights_gL.new_zeros(10)
    slice_sums_g = tokens.weights_gL.new_zeros(g, SLICE_TERMS)
    for in_flight in iter_chunks(inputs, plan, tokens, K=K):
        # Logits [n, v] of both models are computed; the softmax over the whole vocabulary needs the other slices.
        chunk, span = in_flight.wait(inputs), in_flight.span
        own_tokens = slice(rank * (span.stop - span.start), (rank + 1) * (span.stop - span.start))
        own_terms = chunk.token_terms(own_tokens)
        token_sums += own_terms.sum(dim=1)
        if diagnostics is not None:
            diagnostics.add(chunk, span, own_tokens)
        # This slice's share of the divergence of every token; dlogits [n, v] as the products take it.
        dlogits_nv = None if gradients is None else gradients.dlogits_memory(chunk.student.logits.z_nv)
        slice_terms = chunk.write_dlogits(dlogits_nv)
        slice_sums_g += slice_terms.view(g, -1, SLICE_TERMS).sum(dim=1)
        if each is not None:
            each.add(span, own_terms, slice_terms)
        if gradients is not None and dlogits_nv is not None:
            # dW += dlogitsᵀ · X; dX = dlogits · W, reduce-scattered while the next chunk is computed.
            gradients.add(dlogits_nv, in_flight.hidden_nD, span, inputs)
            gradients.receive(in_flight=plan.in_flight)
    if gradients is not None:
        gradients.receive(in_flight=1)

    # One all-reduce a call: the slices' shares, summed, are the divergence of each rank's tokens.
    divergence, kl, divergence_in_loss = all_reduce_sum(slice_sums_g, group)[rank].unbind()
    log_z_squared, tail, ce_in_loss, tail_in_loss = token_sums[6:].unbind()
    loss = divergence_in_loss + tail_in_loss + ce_in_loss + inputs.divergence.z_loss * log_z_squared
    metrics = torch.cat([torch.stack([divergence + tail, kl]), token_sums[:6]])
    if diagnostics is not None:
        metrics = torch.cat([metrics, diagnostics.sums(tokens.weights_gL, inputs.vocab)])
    per_token = None if each is None else each.of_this_rank(len(inputs.labels_N), inputs.vocab)
    return loss, metrics, per_token, gradients


@dataclass(frozen=True)
class PerToken:
    """The terms of each token, of all chunks so far."""

    own_10L: Tensor
    """`Chunk.token_terms` of this rank's tokens."""
    slice_gL3: Tensor
    """This slice's shares of the divergence, as `Chunk.write_dlogits` returns them."""

    @classmethod
    def zeros(cls, like_gL: Tensor) -> "PerToken":
        return cls(like_gL.new_zeros(10, like_gL.shape[1]), like_gL.new_zeros(*like_gL.shape, SLICE_TERMS))

    def add(self, span: slice, own_terms: Tensor, slice_terms: Tensor) -> None:
        self.own_10L[:, span] = own_terms
        self.slice_gL3[:, span] = slice_terms.view(len(self.slice_gL3), -1, SLICE_TERMS)

    def of_this_rank(self, tokens: int, vocab: VocabSlice) -> Tensor:
        """[tokens, 5]: `PER_TOKEN_NAMES` of this rank's tokens. Collective over the vocab group."""
        own_L3 = all_reduce_sum(self.slice_gL3, vocab.group)[group_rank(vocab.group)]
        divergence_L, kl_L, _ = own_L3.unbind(dim=1)
        student_ce_L, teacher_ce_L, _, _, agreement_L, _, _, tail_L, *_ = self.own_10L
        values = (divergence_L + tail_L, kl_L, student_ce_L, teacher_ce_L, agreement_L)
        return torch.stack(values, dim=1)[:tokens]


def _lowest_entropy(inputs: LossInputs, plan: ChunkPlan, tokens: GroupTokens) -> Tensor:
    """[g, L] bool: the `label_fraction` of the labelled tokens with the lowest teacher entropy.

    One pass over the teacher's head.
    """
    entropy_gL = torch.zeros_like(tokens.weights_gL)
    for in_flight in iter_chunks(inputs, plan, tokens, teacher_alone=True):
        (teacher,) = in_flight.pending.wait(inputs.vocab)
        entropy_gL[:, in_flight.span] = teacher.entropy_n.view(len(entropy_gL), -1)
    labelled = (tokens.weights_gL != 0) & (tokens.labels_gL != IGNORED_LABEL)
    count = (labelled.sum().double() * inputs.divergence.label_fraction).floor()
    return ascending_places(torch.where(labelled, entropy_gL, math.inf)) < count
