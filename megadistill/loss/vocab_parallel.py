"""The vocabulary-parallel loss: the heads, the divergence and its gradient in one pass, a chunk of tokens at a time.

The front of the room: what a caller passes and gets, and autograd's view of it. `loss/reference.py` defines what it
computes, `passes.py` does it, docs/loss.md tells the order of work.

Legend: N this rank's tokens; D student width, E teacher width; w this rank's rows of the vocabulary, v of them true
(not padding); K ids kept of a token.
"""

from typing import Any

import torch
from torch import Tensor

from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.buffers import LOGIT_MEMORY
from megadistill.loss.diagnostics import unpacked
from megadistill.loss.divergence import Divergence, Elementwise
from megadistill.loss.heads import Head
from megadistill.loss.inputs import Problem
from megadistill.loss.passes import evaluate
from megadistill.loss.reference import require_sparse
from megadistill.types import METRIC_NAMES, LogitTransform, LossTerms, SparseTargets


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    divergence: Divergence,
    vocab: VocabSlice,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logits: LogitTransform = LogitTransform(),
    teacher_logits: LogitTransform = LogitTransform(),
    logit_memory: int = LOGIT_MEMORY,
    elementwise: Elementwise = Elementwise.EAGER,
    diagnose: bool = False,
) -> LossTerms:
    """`divergence` of student against teacher, summed over this rank's tokens, each times its weight.

    Collective over `vocab.group`: every rank passes its own N tokens (N may differ, and may be 0) and its own rows of
    both heads, and either all of them want gradients or none does. `LossTerms.loss` belongs to this rank's tokens; the
    gradients are those of the sum of the losses over the group, so call backward with the same upstream gradient on
    every rank, once. Where no gradient is wanted (grad mode off, or nothing requires one) only the values are computed.

    Args:
        student_hidden: [N, D], what the student's head reads; float64, float32 or bfloat16, products accumulate in
            float32 (float64 for float64).
        student_weight: [w, D], this rank's rows, of the same dtype. Its gradient is complete without a collective, and
            float32 where `student_weight.grad_dtype` says so; that of padding rows is zero.
        teacher_hidden: [N, E]. The teacher gets no gradient.
        teacher_weight: [w', E], the teacher's rows for the same ids; its padding may be another (w' ≥ v).
        labels: [N] int64 global ids, or `IGNORED_LABEL`: no cross-entropy for that token; its other terms count.
        token_weights: [N]. With weights 1/(tokens of the step) the terms are means. A token of weight 0 contributes
            nothing, whatever its hidden states hold.
        divergence: the terms of the loss and their weights.
        vocab: which rows of the vocabulary this rank holds; slices may be uneven, empty or block-cyclic.
        student_bias, teacher_bias: [w] and [w'], added to the products; the student's gets a gradient like its head. A
            teacher's bias of -inf says that it does not know an id (reverse KL is then infinite).
        student_logits, teacher_logits: what each model does to its products before the softmax.
        logit_memory: bytes of logits, of both models, that exist at a time on a rank: the tokens of a chunk follow from
            it, at least one a rank. The smallest of the group's counts.
        elementwise: whether the arithmetic between the products is compiled.
        diagnose: whether `LossTerms.diagnostics` is wanted: a second look at the logits of each chunk.

    Returns:
        `LossTerms` in nats, float32 (float64 for float64): `loss` differentiable, the others detached.

    Raises:
        ValueError: shapes, dtypes or labels that do not fit, slices that do not add up to the vocabulary, or ranks that
            disagree about gradients.
    """
    heads = (
        Head("student", student_hidden, student_weight, student_bias, student_logits),
        Head("teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_logits),
    )
    return _loss(Problem(heads, labels, token_weights, divergence, vocab, logit_memory, elementwise, diagnose=diagnose))


def label_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    vocab: VocabSlice,
    z_loss: float = 0.0,
    student_bias: Tensor | None = None,
    student_logits: LogitTransform = LogitTransform(),
    logit_memory: int = LOGIT_MEMORY,
    elementwise: Elementwise = Elementwise.EAGER,
) -> LossTerms:
    """Cross-entropy against the labels plus `z_loss · (ln Z)²`: `distill_loss` without a teacher (its terms are 0)."""
    divergence = Divergence(kd_weight=0.0, ce_weight=1.0, z_loss=z_loss)
    heads = (Head("student", student_hidden, student_weight, student_bias, student_logits),)
    return _loss(Problem(heads, labels, token_weights, divergence, vocab, logit_memory, elementwise))


def sparse_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    targets: SparseTargets,
    labels: Tensor,
    *,
    token_weights: Tensor,
    divergence: Divergence,
    vocab: VocabSlice,
    student_bias: Tensor | None = None,
    student_logits: LogitTransform = LogitTransform(),
    logit_memory: int = LOGIT_MEMORY,
    elementwise: Elementwise = Elementwise.EAGER,
) -> LossTerms:
    """Forward KL against what was kept of the teacher's distribution, plus cross-entropy and z-loss.

    `distill_loss` with `targets` in the teacher's place: `divergence` and `kl` of the terms are those against the
    targets, the other terms of the teacher are 0. Which targets are biased, and how, is in docs/loss.md.

    Args:
        targets: of this rank's N tokens. K may differ between ranks.

    Raises:
        ValueError: as in `distill_loss`; another divergence than forward KL, targets of another temperature, or ids
            outside the vocabulary.
    """
    require_sparse(divergence, targets)
    heads = (Head("student", student_hidden, student_weight, student_bias, student_logits),)
    return _loss(Problem(heads, labels, token_weights, divergence, vocab, logit_memory, elementwise, targets))


def _loss(problem: Problem) -> LossTerms:
    student = problem.student
    wanting = [t for t in (student.hidden_ND, student.weight_wD, student.bias_w) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and wanting:
        loss, metrics = _GradientInForward.apply(  # type: ignore[no-untyped-call]
            student.hidden_ND, student.weight_wD, student.bias_w, problem
        )
    else:
        outcome = evaluate(problem, with_gradient=False)
        loss, metrics = outcome.loss, outcome.metrics
    diagnostics = unpacked(metrics[8:]) if problem.diagnose else None
    scalars = dict(zip(METRIC_NAMES, (loss, *metrics[:8].unbind()), strict=True))
    return LossTerms(**scalars, diagnostics=diagnostics)


class _GradientInForward(torch.autograd.Function):
    """The gradients are there when the forward ends; the backward scales them and hands them over."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_wD: Tensor, bias_w: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor]:
        outcome = evaluate(problem, with_gradient=True)
        ctx.gradients = outcome.gradients
        # Only a leaf can ask for a gradient of another dtype (a bf16 parameter that accumulates in float32).
        ctx.weight_grad_dtype = (weight_wD.grad_dtype if weight_wD.is_leaf else None) or weight_wD.dtype
        ctx.mark_non_differentiable(outcome.metrics)
        return outcome.loss, outcome.metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss has been through backward already, and its gradients went with that; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a scaled copy of the float32 head gradient would be as large as the head.
        weight_grad_wD = gradients.weight_wD.mul_(upstream).to(ctx.weight_grad_dtype)
        bias_grad_w = None if gradients.bias_w is None else gradients.bias_w.mul_(upstream)
        return gradients.hidden_ND.mul_(upstream), weight_grad_wD, bias_grad_w, None
