"""The vocabulary-parallel loss: both heads, the divergence and its gradient in one pass, a chunk of tokens at a time.

It knows tensors, a `VocabSlice` and the collectives of comm; it does not know models, optimizers or where weights live.
`loss/reference.py` defines what it computes, docs/loss.md tells the order of work. The gradient is made in the forward,
by hand: no collective is ever differentiated, which is how such losses come to be wrong by a factor of g.

Legend: N this rank's tokens, L those of the rank that has most; g ranks of the vocab group; k tokens that each of them
gives to a chunk, n = g·k tokens of a chunk; D student width, E teacher width; w this rank's rows of the vocabulary, v
of them true (not padding); "slope": the derivative of the group's loss by the student's logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadistill.comm.collectives import all_gather_rows, all_reduce_sum, group_rank, group_size, reduce_scatter_rows
from megadistill.comm.vocabulary import VocabSlice
from megadistill.loss.chunk import Chunk
from megadistill.loss.divergence import Divergence
from megadistill.records import IGNORED_LABEL, LossTerms


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
    chunk_tokens: int = 1024,
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
        teacher_weight: [w, E], the same rows of the teacher's head.
        labels: [N] int64 global ids, or `IGNORED_LABEL`: no cross-entropy for that token; its other terms count.
        token_weights: [N]. With weights 1/(tokens of the step) the terms are means. A token of weight 0 contributes
            nothing, whatever its hidden states hold.
        divergence: the terms of the loss and their weights.
        vocab: which rows of the vocabulary this rank holds; slices may be uneven, empty or block-cyclic.
        chunk_tokens: tokens of the whole group whose logits exist at a time. Memory beyond inputs and gradients is
            about `2 · chunk_tokens · w` floats.

    Returns:
        `LossTerms` in nats, float32 (float64 for float64): `loss` differentiable, the others detached.

    Raises:
        ValueError: shapes, dtypes or labels that do not fit, slices that do not add up to the vocabulary, or ranks that
            disagree about gradients.
    """
    heads = (_Head("student", student_hidden, student_weight), _Head("teacher", teacher_hidden, teacher_weight))
    return _loss(_Problem(heads, labels, token_weights, divergence, vocab, chunk_tokens))


def label_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    vocab: VocabSlice,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
) -> LossTerms:
    """Cross-entropy against the labels plus `z_loss · (ln Z)²`: `distill_loss` without a teacher (its terms are 0)."""
    divergence = Divergence(kd_weight=0.0, ce_weight=1.0, z_loss=z_loss)
    heads = (_Head("student", student_hidden, student_weight),)
    return _loss(_Problem(heads, labels, token_weights, divergence, vocab, chunk_tokens))


@dataclass(frozen=True)
class _Head:
    name: str
    hidden_ND: Tensor
    weight_wD: Tensor


@dataclass(frozen=True)
class _Problem:
    """The arguments of a call, and what follows from them."""

    heads: tuple[_Head, ...]
    labels_N: Tensor
    weights_N: Tensor
    divergence: Divergence
    vocab: VocabSlice
    chunk_tokens: int

    def __post_init__(self) -> None:
        tokens, rows = self.labels_N.shape[0], self.vocab.rows
        for name, hidden, weight in ((head.name, head.hidden_ND, head.weight_wD) for head in self.heads):
            if hidden.ndim != 2 or hidden.shape[0] != tokens or weight.shape != (rows, hidden.shape[1]):
                raise ValueError(
                    f"{name} hidden states {list(hidden.shape)} and head {list(weight.shape)} do not fit "
                    f"{tokens} labels and the {rows} rows of the slice; pass [{tokens}, width] and [{rows}, width]"
                )
            if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float64, torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{name} hidden states are {hidden.dtype} and the head is {weight.dtype}; cast both to one of "
                    "float64, float32 or bfloat16 (float16 underflows with weights of 1/tokens)"
                )
        if self.weights_N.shape != self.labels_N.shape:
            raise ValueError(f"{list(self.weights_N.shape)} token weights for {tokens} labels; pass one for each")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}; a chunk needs at least one token")
        assert self.vocab.size < 2**24, "ids travel among float32 statistics, which hold them exactly below 2**24"

    @property
    def dtype(self) -> torch.dtype:
        """Of every accumulator: products, statistics, sums."""
        return torch.float64 if any(h.hidden_ND.dtype == torch.float64 for h in self.heads) else torch.float32


@dataclass(frozen=True)
class _Outcome:
    loss: Tensor
    metrics: Tensor
    """[6]: the other fields of `LossTerms`, in order."""
    gradients: "_Gradients | None"


def _loss(problem: _Problem) -> LossTerms:
    student = problem.heads[0]
    if torch.is_grad_enabled() and (student.hidden_ND.requires_grad or student.weight_wD.requires_grad):
        loss, metrics = _GradientInForward.apply(  # type: ignore[no-untyped-call]
            student.hidden_ND, student.weight_wD, problem
        )
    else:
        outcome = _evaluate(problem, with_gradient=False)
        loss, metrics = outcome.loss, outcome.metrics
    return LossTerms(loss, *metrics.unbind())


class _GradientInForward(torch.autograd.Function):
    """The gradients are there when the forward ends; the backward scales them and hands them over."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_wD: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
        outcome = _evaluate(problem, with_gradient=True)
        ctx.gradients = outcome.gradients
        # Only a leaf can ask for a gradient of another dtype (a bf16 parameter that accumulates in float32).
        ctx.weight_grad_dtype = (weight_wD.grad_dtype if weight_wD.is_leaf else None) or weight_wD.dtype
        ctx.mark_non_differentiable(outcome.metrics)
        return outcome.loss, outcome.metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss has been through backward already, and its gradients went with that; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a scaled copy of the float32 head gradient would be as large as the head.
        weight_grad_wD = gradients.weight_wD.mul_(upstream).to(ctx.weight_grad_dtype)
        return gradients.hidden_ND.mul_(upstream), weight_grad_wD, None


@torch.no_grad()
def _evaluate(problem: _Problem, *, with_gradient: bool) -> _Outcome:
    heads, dtype, group, v = problem.heads, problem.dtype, problem.vocab.group, problem.vocab.true_rows
    g, rank = group_size(group), group_rank(group)
    longest = _agree(problem, with_gradient=with_gradient)
    labels_gL = all_gather_rows(_padded(problem.labels_N, longest, IGNORED_LABEL), group).view(g, longest)
    weights_gL = all_gather_rows(_padded(problem.weights_N.to(dtype), longest, 0), group).view(g, longest)

    # True rows come first, so padding is cut off before any product: no softmax sees it, and its gradient stays zero.
    weights = [_operand(head.weight_wD[:v], dtype) for head in heads]
    k = max(1, min(problem.chunk_tokens // g, longest))
    buffers = [weights_gL.new_empty(g * k, v) for _ in heads]
    gradients = _Gradients.zeros(heads[0], dtype) if with_gradient else None
    sums = weights_gL.new_zeros(5)
    shares_g2 = weights_gL.new_zeros(g, 2)
    for start in range(0, longest, k):
        stop = min(start + k, longest)
        hidden = [_operand(all_gather_rows(_own_rows(head, problem, start, stop), group), dtype) for head in heads]
        logits = [buffer[: g * (stop - start)] for buffer in buffers]
        for hidden_nD, weight_vD, logits_nv in zip(hidden, weights, logits, strict=True):
            _multiply(hidden_nD, weight_vD.T, out=logits_nv)
        chunk = Chunk.read(
            logits,
            labels_n=labels_gL[:, start:stop].flatten(),
            weights_n=weights_gL[:, start:stop].flatten(),
            divergence=problem.divergence,
            vocab=problem.vocab,
        )
        sums += chunk.token_sums(slice(rank * (stop - start), (rank + 1) * (stop - start)))
        shares_n2 = chunk.finish(with_slope=with_gradient)
        shares_g2 += shares_n2.view(g, -1, 2).sum(dim=1)
        if gradients is not None:
            gradients.add(logits[0], hidden[0], weights[0], start, problem.vocab)

    kl, entropy = all_reduce_sum(shares_g2, group)[rank].unbind()
    student_ce, teacher_ce, agreement, log_z, log_z_squared = sums.unbind()
    d = problem.divergence
    loss = d.kd_factor * kl + d.ce_weight * student_ce + d.z_loss * log_z_squared
    return _Outcome(loss, torch.stack([kl, student_ce, teacher_ce, entropy, agreement, log_z]), gradients)


def _agree(problem: _Problem, *, with_gradient: bool) -> int:
    """L. One small all-gather of what the ranks must know of each other, and the call's one host-device sync."""
    labels_N, vocab = problem.labels_N, problem.vocab
    unknown = (labels_N != IGNORED_LABEL) & ((labels_N < 0) | (labels_N >= vocab.size))
    counts = labels_N.new_tensor([[labels_N.shape[0], vocab.true_rows, int(with_gradient)]], dtype=torch.int64)
    told = torch.cat([counts, unknown.sum().view(1, 1)], dim=1)
    tokens, rows, gradient, strangers = zip(*all_gather_rows(told, vocab.group).tolist(), strict=True)
    if sum(rows) != vocab.size:
        raise ValueError(f"the slices hold {list(rows)} true rows, which do not add up to a vocabulary of {vocab.size}")
    if any(strangers):
        raise ValueError(
            f"{list(strangers)} labels (by rank) are neither ids below {vocab.size} nor {IGNORED_LABEL}; "
            f"mark positions without a label with {IGNORED_LABEL}"
        )
    if len(set(gradient)) > 1:
        raise ValueError(
            f"some ranks want gradients and some do not ({list(gradient)}); set requires_grad and the grad mode alike"
        )
    return int(max(tokens))


@dataclass(frozen=True)
class _Gradients:
    """The group's loss, differentiated by this rank's tokens and by its rows of the student's head."""

    hidden_ND: Tensor
    """In the dtype of the hidden states: each token is written once."""
    weight_wD: Tensor
    """In the accumulator's dtype: every chunk adds to it."""

    @classmethod
    def zeros(cls, head: _Head, dtype: torch.dtype) -> "_Gradients":
        return cls(torch.zeros_like(head.hidden_ND), torch.zeros_like(head.weight_wD, dtype=dtype))

    def add(self, slope_nv: Tensor, hidden_nD: Tensor, weight_vD: Tensor, start: int, vocab: VocabSlice) -> None:
        """Adds a chunk: a reduce-scatter returns each token's gradient to its owner, the rows' needs no collective."""
        # On an accelerator a bf16 product wants a bf16 slope; its rounding is 2^-9 of each entry, without a bias.
        slope_nv = slope_nv.to(hidden_nD.dtype)
        _multiply(slope_nv.T, hidden_nD, out=self.weight_wD[: weight_vD.shape[0]], add=True)
        hidden_grad_nD = self.weight_wD.new_empty(hidden_nD.shape)
        _multiply(slope_nv, weight_vD, out=hidden_grad_nD)
        own_kD = reduce_scatter_rows(hidden_grad_nD, vocab.group)
        mine_kD = self.hidden_ND[start : start + own_kD.shape[0]]
        mine_kD.copy_(own_kD[: mine_kD.shape[0]])


def _own_rows(head: _Head, problem: _Problem, start: int, stop: int) -> Tensor:
    """[k, D]: this rank's tokens of a chunk; zeros for those of weight 0, and after its last token."""
    dead_k1 = (problem.weights_N[start:stop] == 0).unsqueeze(1)
    return _padded(head.hidden_ND[start:stop].masked_fill(dead_k1, 0), stop - start, 0)


def _padded(rows: Tensor, length: int, fill: int) -> Tensor:
    """`rows` [m, ...] followed by rows of `fill`, `length` in all."""
    padded = rows.new_full((length, *rows.shape[1:]), fill)
    padded[: rows.shape[0]] = rows
    return padded


def _operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix as a product takes it: in the accumulator's dtype, or bf16 where the device accumulates in float32."""
    accumulates = matrix.device.type != "cpu" and matrix.dtype == torch.bfloat16 and dtype == torch.float32
    return matrix if accumulates else matrix.to(dtype)


def _multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """out = left @ right, or out += left @ right, in the dtype of `out` from the first partial sum to the last."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=int(add), out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=int(add), out=out)
