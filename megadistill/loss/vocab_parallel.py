"""The vocabulary-parallel loss: the heads, the divergence and its gradient in one pass, a chunk of tokens at a time.

It knows tensors, a `VocabSlice` and the collectives of comm; it does not know models, optimizers or where weights live.
`loss/reference.py` defines what it computes, docs/loss.md tells the order of work. The gradient is made in the forward,
by hand: no collective is ever differentiated, which is how such losses come to be wrong by a factor of g.

Legend: N this rank's tokens, L those of the rank that has most; g ranks of the vocab group; k tokens that each of them
gives to a chunk, n = g·k tokens of a chunk; D student width, E teacher width; w this rank's rows of the vocabulary, v
of them true (not padding); K ids kept of a token; "slope": the derivative of the group's loss by the student's
products.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megadistill.comm.collectives import (
    Pending,
    all_gather_rows,
    all_reduce_sum,
    group_rank,
    group_size,
    start_all_gather_rows,
    start_reduce_scatter_rows,
)
from megadistill.comm.vocabulary import VocabSlice
from megadistill.loss import pointwise
from megadistill.loss.chunk import PAIRWISE, SHARES, Chunk, Tokens
from megadistill.loss.divergence import Divergence, Elementwise
from megadistill.loss.reference import DECILES, require_sparse
from megadistill.loss.softmax import Kept, Logits, Reading
from megadistill.records import (
    IGNORED_LABEL,
    METRIC_NAMES,
    TOP_K,
    Diagnostics,
    LogitTransform,
    LossTerms,
    SparseTargets,
    Tail,
)

LOGIT_MEMORY = 256 << 20
"""Bytes of logits that exist at a time, by default."""


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
        _Head("student", student_hidden, student_weight, student_bias, student_logits),
        _Head("teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_logits),
    )
    return _loss(
        _Problem(heads, labels, token_weights, divergence, vocab, logit_memory, elementwise, diagnose=diagnose)
    )


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
    heads = (_Head("student", student_hidden, student_weight, student_bias, student_logits),)
    return _loss(_Problem(heads, labels, token_weights, divergence, vocab, logit_memory, elementwise))


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
    heads = (_Head("student", student_hidden, student_weight, student_bias, student_logits),)
    return _loss(_Problem(heads, labels, token_weights, divergence, vocab, logit_memory, elementwise, targets))


@dataclass(frozen=True)
class _Head:
    name: str
    hidden_ND: Tensor
    weight_wD: Tensor
    bias_w: Tensor | None
    transform: LogitTransform


@dataclass(frozen=True)
class _Problem:
    """The arguments of a call, and what follows from them."""

    heads: tuple[_Head, ...]
    labels_N: Tensor
    weights_N: Tensor
    divergence: Divergence
    vocab: VocabSlice
    logit_memory: int
    elementwise: Elementwise
    targets: SparseTargets | None = None
    diagnose: bool = False

    def __post_init__(self) -> None:
        tokens, rows = self.labels_N.shape[0], self.vocab.rows
        for head in self.heads:
            hidden, weight, bias = head.hidden_ND, head.weight_wD, head.bias_w
            enough = weight.shape[0] == rows if head.name == "student" else weight.shape[0] >= self.vocab.true_rows
            if hidden.shape != (tokens, hidden.shape[-1]) or weight.shape[1:] != hidden.shape[1:] or not enough:
                raise ValueError(
                    f"{head.name} hidden states {list(hidden.shape)} and head {list(weight.shape)} do not fit {tokens} "
                    f"labels and the slice's {rows} rows ({self.vocab.true_rows} without padding); pass "
                    f"[{tokens}, width] and [{rows}, width]"
                )
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"{head.name} bias {list(bias.shape)} does not fit its head {list(weight.shape)}; pass one a row"
                )
            if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float64, torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{head.name} hidden states are {hidden.dtype} and the head is {weight.dtype}; cast both to one of "
                    "float64, float32 or bfloat16 (float16 underflows with weights of 1/tokens)"
                )
        if self.weights_N.shape != self.labels_N.shape:
            raise ValueError(f"{list(self.weights_N.shape)} token weights for {tokens} labels; pass one for each")
        if self.targets is not None and (
            self.targets.ids.shape[0] != tokens
            or self.targets.ids.shape != self.targets.probs.shape
            or self.targets.log_tail.shape != (tokens,)
        ):
            raise ValueError(
                f"target ids {list(self.targets.ids.shape)}, probs {list(self.targets.probs.shape)} and log_tail "
                f"{list(self.targets.log_tail.shape)} do not fit {tokens} labels; pass [{tokens}, K] twice, [{tokens}]"
            )
        if self.logit_memory < 1:
            raise ValueError(f"logit_memory is {self.logit_memory} bytes; a chunk needs at least one token's logits")
        assert self.vocab.size < 2**24, "ids travel among float32 statistics, which hold them exactly below 2**24"

    @property
    def dtype(self) -> torch.dtype:
        """Of every accumulator: products, statistics, sums."""
        return torch.float64 if any(h.hidden_ND.dtype == torch.float64 for h in self.heads) else torch.float32

    @property
    def student(self) -> _Head:
        return self.heads[0]

    @cached_property
    def operands(self) -> tuple[Tensor, ...]:
        """[v, D] of each head: true rows come first, so padding is cut off before any product; no softmax sees it."""
        return tuple(_operand(head.weight_wD[: self.vocab.true_rows], self.dtype) for head in self.heads)


@dataclass(frozen=True)
class _Outcome:
    loss: Tensor
    metrics: Tensor
    """[8]: the other scalars of `LossTerms`, in order; [24] with those of `Diagnostics` behind them."""
    gradients: "_Gradients | None"


def _loss(problem: _Problem) -> LossTerms:
    student = problem.student
    wanting = [t for t in (student.hidden_ND, student.weight_wD, student.bias_w) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and wanting:
        loss, metrics = _GradientInForward.apply(  # type: ignore[no-untyped-call]
            student.hidden_ND, student.weight_wD, student.bias_w, problem
        )
    else:
        outcome = _evaluate(problem, with_gradient=False)
        loss, metrics = outcome.loss, outcome.metrics
    diagnostics = None
    if problem.diagnose:
        acceptance, reverse_kl, jsd = metrics[8:11].unbind()
        top_k_mass, decile = metrics[11:].split([len(TOP_K), DECILES])
        diagnostics = Diagnostics(acceptance, reverse_kl, jsd, top_k_mass, decile)
    scalars = dict(zip(METRIC_NAMES, (loss, *metrics[:8].unbind()), strict=True))
    return LossTerms(**scalars, diagnostics=diagnostics)


class _GradientInForward(torch.autograd.Function):
    """The gradients are there when the forward ends; the backward scales them and hands them over."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_wD: Tensor, bias_w: Tensor | None, problem: _Problem
    ) -> tuple[Tensor, Tensor]:
        outcome = _evaluate(problem, with_gradient=True)
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


@torch.no_grad()
def _evaluate(problem: _Problem, *, with_gradient: bool) -> _Outcome:
    group = problem.vocab.group
    g, rank = group_size(group), group_rank(group)
    plan = _agree(problem, with_gradient=with_gradient)
    everyone = _Everyone.gather(problem, plan)
    if problem.divergence.label_fraction > 0:
        everyone = replace(everyone, routed_gL=_surest(problem, plan, everyone))

    gradients = _Gradients.zeros(problem.student, problem.dtype) if with_gradient else None
    own_sums = everyone.weights_gL.new_zeros(10)
    shares_g = everyone.weights_gL.new_zeros(g, SHARES)
    closer = _CloserLook.empty(everyone) if problem.diagnose else None
    returning: deque[tuple[slice, Pending]] = deque()
    for begun in _walk(problem, plan, everyone):
        chunk = begun.chunk(problem)
        k = begun.span.stop - begun.span.start
        own = slice(rank * k, (rank + 1) * k)
        own_sums += chunk.own_sums(own)
        if closer is not None:
            closer.add(chunk, begun.span, own)
        shares_g += chunk.write_slope(with_slope=with_gradient).view(g, k, SHARES).sum(dim=1)
        if gradients is not None:
            returning.append((begun.span, gradients.add(chunk.student.logits.z_nv, begun.hidden_nD, problem)))
            if len(returning) == plan.in_flight:
                gradients.receive(*returning.popleft())
    while gradients is not None and returning:
        gradients.receive(*returning.popleft())

    divergence, kl, divergence_in_loss = all_reduce_sum(shares_g, group)[rank].unbind()
    log_z_squared, other, ce_in_loss, other_in_loss = own_sums[6:].unbind()
    loss = divergence_in_loss + other_in_loss + ce_in_loss + problem.divergence.z_loss * log_z_squared
    metrics = torch.cat([torch.stack([divergence + other, kl + other]), own_sums[:6]])
    if closer is not None:
        metrics = torch.cat([metrics, closer.sums(everyone, problem.vocab)])
    return _Outcome(loss, metrics, gradients)


@dataclass(frozen=True)
class _Plan:
    """What the ranks agree on before the first chunk."""

    longest: int
    """L."""
    tokens: int
    """k."""
    in_flight: int
    """Chunks whose logits exist at a time: while one's statistics travel, the next one's products run."""
    kept: int
    """K."""

    def spans(self) -> list[slice]:
        """Each chunk's tokens, of every rank."""
        return [slice(start, min(start + self.tokens, self.longest)) for start in range(0, self.longest, self.tokens)]


def _agree(problem: _Problem, *, with_gradient: bool) -> _Plan:
    """One small all-gather of what the ranks must know of each other, and the call's one host-device sync."""
    labels_N, vocab, targets = problem.labels_N, problem.vocab, problem.targets
    strangers = ((labels_N != IGNORED_LABEL) & ((labels_N < 0) | (labels_N >= vocab.size))).sum().view(1)
    unknown = torch.zeros_like(strangers) if targets is None else (targets.ids >= vocab.size).sum().view(1)
    kept = 0 if targets is None else targets.ids.shape[1]
    itemsize = torch.empty((), dtype=problem.dtype).itemsize
    fit = problem.logit_memory // (len(problem.heads) * itemsize * max(1, vocab.true_rows))
    counts = labels_N.new_tensor(
        [labels_N.shape[0], vocab.true_rows, int(with_gradient), kept, min(fit, 1 << 40)], dtype=torch.int64
    )
    told = all_gather_rows(torch.cat([counts, strangers, unknown]).view(1, -1), vocab.group)
    tokens, rows, gradient, kepts, fits, labels, ids = zip(*told.tolist(), strict=True)
    if sum(rows) != vocab.size:
        raise ValueError(f"the slices hold {list(rows)} true rows, which do not add up to a vocabulary of {vocab.size}")
    if any(labels):
        raise ValueError(
            f"{list(labels)} labels (by rank) are neither ids below {vocab.size} nor {IGNORED_LABEL}; "
            f"mark positions without a label with {IGNORED_LABEL}"
        )
    if any(ids):
        raise ValueError(
            f"{list(ids)} target ids (by rank) are not below {vocab.size}; mark places without an id with -1"
        )
    if len(set(gradient)) > 1:
        raise ValueError(
            f"some ranks want gradients and some do not ({list(gradient)}); set requires_grad and the grad mode alike"
        )
    g, longest = len(tokens), int(max(tokens))
    in_flight = 1 if vocab.group is None else 2
    chunks = math.ceil(longest / max(1, min(fits) // (g * in_flight)))
    return _Plan(longest, math.ceil(longest / max(1, chunks)) or 1, in_flight, int(max(kepts)))


@dataclass(frozen=True)
class _Everyone:
    """What is small enough to be known of all tokens of the group at once: [g, L] each."""

    labels_gL: Tensor
    weights_gL: Tensor
    routed_gL: Tensor
    """True where the label stands in for the divergence."""

    @classmethod
    def gather(cls, problem: _Problem, plan: _Plan) -> "_Everyone":
        group, longest = problem.vocab.group, plan.longest
        g = group_size(group)
        labels_L = _padded(problem.labels_N, longest, IGNORED_LABEL)
        weights_L = _padded(problem.weights_N.to(problem.dtype), longest, 0)
        labels_gL = all_gather_rows(labels_L, group).view(g, longest)
        weights_gL = all_gather_rows(weights_L, group).view(g, longest)
        return cls(labels_gL, weights_gL, torch.zeros_like(labels_gL, dtype=torch.bool))

    @property
    def live_gL(self) -> Tensor:
        return self.weights_gL != 0

    def tokens(self, span: slice, problem: _Problem) -> Tokens:
        d, weights_n = problem.divergence, self.weights_gL[:, span].flatten()
        labels_n, routed_n = self.labels_gL[:, span].flatten(), self.routed_gL[:, span].flatten()
        labelled_n, one = (labels_n != IGNORED_LABEL).to(weights_n.dtype), weights_n.new_ones(())
        return Tokens(
            weights_n=weights_n,
            labelled_n=labelled_n,
            label_rows_n=problem.vocab.local_rows(labels_n),
            kd_n=torch.where(routed_n, 0, weights_n * d.kd_factor),
            ce_n=weights_n * labelled_n * torch.where(routed_n, d.kd_weight * one + d.ce_weight, d.ce_weight * one),
        )


@dataclass(frozen=True)
class _Begun:
    """A chunk whose logits are made and read, the small all-gather under way."""

    span: slice
    hidden_nD: Tensor
    """The student's."""
    tokens: Tokens
    kept: Kept | None
    reading: Reading

    def chunk(self, problem: _Problem) -> Chunk:
        softmaxes = self.reading.wait(problem.vocab)
        return Chunk(
            tokens=self.tokens,
            student=softmaxes[0],
            teacher=softmaxes[1] if len(softmaxes) == 2 else None,
            kept=self.kept,
            divergence=problem.divergence,
            transform=problem.student.transform,
            vocab=problem.vocab,
        )


def _walk(problem: _Problem, plan: _Plan, everyone: _Everyone, first_head: int = 0) -> Iterator[_Begun]:
    """The chunks, in order: gathers hidden states, multiplies them with the heads, reads the softmaxes. Collective.

    The next chunk's hidden states travel while this one's products run, and this one's statistics while the next
    one's do.
    """
    vocab, targets, heads = problem.vocab, problem.targets, problem.heads[first_head:]
    buffers = [
        [everyone.weights_gL.new_empty(len(everyone.weights_gL) * plan.tokens, vocab.true_rows) for _ in heads]
        for _ in range(plan.in_flight)
    ]
    if targets is not None:
        targets = _widened(targets, plan.kept, problem.weights_N)

    def send(span: slice) -> list[Pending]:
        rows = [_own_rows(head.hidden_ND, problem.weights_N, span) for head in heads]
        if targets is not None:
            numbers = torch.cat([targets.probs, targets.log_tail.unsqueeze(1)], dim=1).to(problem.dtype)
            length = span.stop - span.start
            rows += [_padded(targets.ids[span], length, -1), _padded(numbers[span], length, 0)]
        return [start_all_gather_rows(each, vocab.group) for each in rows]

    spans = plan.spans()
    arriving = send(spans[0]) if spans else []
    begun: deque[_Begun] = deque()
    for i, span in enumerate(spans):
        arrived = [pending.wait() for pending in arriving]
        arriving = send(spans[i + 1]) if i + 1 < len(spans) else []
        hidden = [_operand(rows, problem.dtype) for rows in arrived[: len(heads)]]
        kept = None if targets is None else _kept(vocab, arrived[-2], arrived[-1], targets.tail)
        tokens = everyone.tokens(span, problem)
        logits = [
            _logits(head, hidden_nD, weight_vD, buffer_nv[: len(hidden_nD)], problem)
            for head, hidden_nD, weight_vD, buffer_nv in zip(
                heads, hidden, problem.operands[first_head:], buffers[i % plan.in_flight], strict=True
            )
        ]
        reading = Reading.start(logits, tokens.label_rows_n, vocab, kept)
        begun.append(_Begun(span, hidden[0], tokens, kept, reading))
        if len(begun) == plan.in_flight:
            yield begun.popleft()
    yield from begun


def _logits(head: _Head, hidden_nD: Tensor, weight_vD: Tensor, out_nv: Tensor, problem: _Problem) -> Logits:
    _multiply(hidden_nD, weight_vD.T, out=out_nv)
    logits, transform = Logits(out_nv, problem.divergence.temperature, problem.elementwise), head.transform
    bias_v = None if head.bias_w is None else head.bias_w[: len(weight_vD)].to(problem.dtype)
    if bias_v is not None or transform != LogitTransform():
        for rows in logits.blocks():
            logits.stage(pointwise.transform_)(out_nv[rows], bias_v, transform.scale, transform.softcap)
    return logits


def _surest(problem: _Problem, plan: _Plan, everyone: _Everyone) -> Tensor:
    """[g, L] bool: the labelled tokens with the lowest teacher entropy. One pass over the teacher's head."""
    entropy_gL = torch.zeros_like(everyone.weights_gL)
    for begun in _walk(problem, plan, everyone, first_head=1):
        (softmax,) = begun.reading.wait(problem.vocab)
        entropy_gL[:, begun.span] = softmax.entropy_n.view(len(entropy_gL), -1)
    labelled = everyone.live_gL & (everyone.labels_gL != IGNORED_LABEL)
    count = (labelled.sum().double() * problem.divergence.label_fraction).floor()
    place = _places(torch.where(labelled, entropy_gL, math.inf))
    return place < count


def _places(values: Tensor) -> Tensor:
    """Each value's place among all of them, from 0; of equals, the first comes first."""
    order = values.flatten().argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(values.shape)


@dataclass(frozen=True)
class _CloserLook:
    """What `Diagnostics` is made of, as it comes in."""

    pairwise_gL4: Tensor
    """This slice's shares."""
    entropy_gL: Tensor
    top_k_mass: Tensor
    """[3]: summed over this rank's tokens, weighted."""

    @classmethod
    def empty(cls, everyone: _Everyone) -> "_CloserLook":
        w_gL = everyone.weights_gL
        return cls(w_gL.new_zeros(*w_gL.shape, PAIRWISE), torch.zeros_like(w_gL), w_gL.new_zeros(len(TOP_K)))

    def add(self, chunk: Chunk, span: slice, own: slice) -> None:
        """Reads the logits of a chunk, before the slope overwrites them. Collective."""
        assert chunk.teacher is not None
        g = len(self.entropy_gL)
        self.pairwise_gL4[:, span] = chunk.diagnose().view(g, -1, PAIRWISE)
        self.entropy_gL[:, span] = chunk.teacher.entropy_n.view(g, -1)
        self.top_k_mass.add_(chunk.tokens.weights_n[own] @ chunk.top_k_mass()[own])

    def sums(self, everyone: _Everyone, vocab: VocabSlice) -> Tensor:
        """[16]: the fields of `Diagnostics`, one after the other, of this rank's tokens. Collective."""
        group, rank = vocab.group, group_rank(vocab.group)
        pairwise_L4 = all_reduce_sum(self.pairwise_gL4, group)[rank]
        kl, *others = (everyone.weights_gL[rank].unsqueeze(1) * pairwise_L4).unbind(dim=1)
        reverse, jsd, acceptance = (other.sum() for other in others)
        live_gL = everyone.live_gL
        place_L = _places(torch.where(live_gL, self.entropy_gL, math.inf))[rank]
        decile_L = (place_L * DECILES // live_gL.sum().clamp_min(1)).clamp_max(DECILES - 1)
        deciles = kl.new_zeros(DECILES).index_add_(0, decile_L, kl)
        return torch.cat([torch.stack([acceptance, reverse, jsd]), self.top_k_mass, deciles])


@dataclass(frozen=True)
class _Gradients:
    """The group's loss, differentiated by this rank's tokens and by its rows of the student's head."""

    hidden_ND: Tensor
    """In the dtype of the hidden states: each token is written once."""
    weight_wD: Tensor
    """In the accumulator's dtype: every chunk adds to it."""
    bias_w: Tensor | None

    @classmethod
    def zeros(cls, head: _Head, dtype: torch.dtype) -> "_Gradients":
        bias_w = None if head.bias_w is None else torch.zeros_like(head.bias_w, dtype=dtype)
        return cls(torch.zeros_like(head.hidden_ND), torch.zeros_like(head.weight_wD, dtype=dtype), bias_w)

    def add(self, slope_nv: Tensor, hidden_nD: Tensor, problem: _Problem) -> Pending:
        """Adds a chunk. The rows' gradient needs no collective; that of the tokens is on its way to their owners."""
        weight_vD = problem.operands[0]
        v = len(weight_vD)
        if self.bias_w is not None:
            self.bias_w[:v] += slope_nv.sum(dim=0)
        # On an accelerator a bf16 product wants a bf16 slope; its rounding is 2^-9 of each entry, without a bias.
        slope_nv = slope_nv.to(hidden_nD.dtype)
        _multiply(slope_nv.T, hidden_nD, out=self.weight_wD[:v], add=True)
        hidden_grad_nD = self.weight_wD.new_empty(hidden_nD.shape)
        _multiply(slope_nv, weight_vD, out=hidden_grad_nD)
        return start_reduce_scatter_rows(hidden_grad_nD, problem.vocab.group)

    def receive(self, span: slice, arriving: Pending) -> None:
        """This rank's tokens of a chunk; what stands after its last token is dropped."""
        mine_kD = self.hidden_ND[span]
        mine_kD.copy_(arriving.wait()[: len(mine_kD)])


def _own_rows(hidden_ND: Tensor, weights_N: Tensor, span: slice) -> Tensor:
    """[k, D]: this rank's tokens of a chunk; zeros for those of weight 0, and after its last token."""
    dead_k1 = (weights_N[span] == 0).unsqueeze(1)
    return _padded(hidden_ND[span].masked_fill(dead_k1, 0), span.stop - span.start, 0)


def _widened(targets: SparseTargets, kept: int, weights_N: Tensor) -> SparseTargets:
    """The targets with K = `kept` places a token, and nothing kept of a token of weight 0."""
    dead_N1, missing = (weights_N == 0).unsqueeze(1), kept - targets.ids.shape[1]
    ids_NK = torch.nn.functional.pad(targets.ids.masked_fill(dead_N1, -1), (0, missing), value=-1)
    probs_NK = torch.nn.functional.pad(
        targets.probs.masked_fill(ids_NK[:, : targets.ids.shape[1]] < 0, 0), (0, missing)
    )
    return replace(targets, ids=ids_NK, probs=probs_NK, log_tail=targets.log_tail.masked_fill(dead_N1.squeeze(1), 0))


def _kept(vocab: VocabSlice, ids_nK: Tensor, numbers_nK: Tensor, tail: Tail) -> Kept:
    return Kept(vocab.local_rows(ids_nK), numbers_nK[:, :-1], numbers_nK[:, -1], tail)


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
