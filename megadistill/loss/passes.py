"""The pass over the tokens: gather, multiply, read, write the slope, multiply again, a chunk at a time.

It knows the collectives of comm and what a `Chunk` does; it does not know autograd. The gradient is made here, by hand:
no collective is ever differentiated, which is how such losses come to be wrong by a factor of g.

Legend: N this rank's tokens, L those of the rank that has most; g ranks of the vocab group; k tokens that each of them
gives to a chunk, n = g·k tokens of a chunk; D student width, E teacher width; w this rank's rows of the vocabulary, v
of them true (not padding); K ids kept of a token; "slope": the derivative of the group's loss by the student's
products.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadistill.distributed.collectives import (
    Pending,
    all_gather_rows,
    all_reduce_sum,
    group_rank,
    group_size,
    start_all_gather_rows,
    start_reduce_scatter_rows,
)
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import buffers, pointwise
from megadistill.loss.chunk import SHARES, Chunk, Tokens
from megadistill.loss.diagnostics import CloserLook, places
from megadistill.loss.heads import Head, multiply, operand, padded
from megadistill.loss.inputs import Plan, Problem, agree
from megadistill.loss.softmax import Kept, Logits, Reading
from megadistill.types import IGNORED_LABEL, LogitTransform, SparseTargets, Tail


@dataclass(frozen=True)
class Outcome:
    loss: Tensor
    metrics: Tensor
    """[8]: the other scalars of `LossTerms`, in order; [24] with those of `Diagnostics` behind them."""
    gradients: "Gradients | None"


@torch.no_grad()
def evaluate(problem: Problem, *, with_gradient: bool) -> Outcome:
    group = problem.vocab.group
    g, rank = group_size(group), group_rank(group)
    plan = agree(problem, with_gradient=with_gradient)
    everyone = Everyone.gather(problem, plan)
    if problem.divergence.label_fraction > 0:
        everyone = replace(everyone, routed_gL=_surest(problem, plan, everyone))

    gradients = None
    if with_gradient:
        written = problem.vocab.true_rows if plan.longest > 0 else 0
        gradients = Gradients.before(problem.student, problem.dtype, rows=written)
    own_sums = everyone.weights_gL.new_zeros(10)
    shares_g = everyone.weights_gL.new_zeros(g, SHARES)
    closer = CloserLook.empty(everyone.weights_gL) if problem.diagnose else None
    returning: deque[tuple[slice, Pending]] = deque()
    for begun in walk(problem, plan, everyone):
        chunk = begun.chunk(problem)
        k = begun.span.stop - begun.span.start
        own = slice(rank * k, (rank + 1) * k)
        own_sums += chunk.own_sums(own)
        if closer is not None:
            closer.add(chunk, begun.span, own)
        shares_g += chunk.write_slope(with_slope=with_gradient).view(g, k, SHARES).sum(dim=1)
        if gradients is not None:
            returning.append(
                (
                    begun.span,
                    gradients.add(chunk.student.logits.z_nv, begun.hidden_nD, problem, first=begun.span.start == 0),
                )
            )
            if len(returning) == plan.in_flight:
                gradients.receive(*returning.popleft())
    while gradients is not None and returning:
        gradients.receive(*returning.popleft())

    divergence, kl, divergence_in_loss = all_reduce_sum(shares_g, group)[rank].unbind()
    log_z_squared, other, ce_in_loss, other_in_loss = own_sums[6:].unbind()
    loss = divergence_in_loss + other_in_loss + ce_in_loss + problem.divergence.z_loss * log_z_squared
    metrics = torch.cat([torch.stack([divergence + other, kl + other]), own_sums[:6]])
    if closer is not None:
        metrics = torch.cat([metrics, closer.sums(everyone.weights_gL, problem.vocab)])
    return Outcome(loss, metrics, gradients)


@dataclass(frozen=True)
class Everyone:
    """What is small enough to be known of all tokens of the group at once: [g, L] each."""

    labels_gL: Tensor
    weights_gL: Tensor
    routed_gL: Tensor
    """True where the label stands in for the divergence."""

    @classmethod
    def gather(cls, problem: Problem, plan: Plan) -> "Everyone":
        group, longest = problem.vocab.group, plan.longest
        g = group_size(group)
        # A token of weight 0 is not there; a label that its teacher does not know would cost it an infinity.
        labels_N = problem.labels_N.masked_fill(problem.weights_N == 0, IGNORED_LABEL)
        labels_L = padded(labels_N, longest, IGNORED_LABEL)
        weights_L = padded(problem.weights_N.to(problem.dtype), longest, 0)
        labels_gL = all_gather_rows(labels_L, group).view(g, longest)
        weights_gL = all_gather_rows(weights_L, group).view(g, longest)
        return cls(labels_gL, weights_gL, torch.zeros_like(labels_gL, dtype=torch.bool))

    def tokens(self, span: slice, problem: Problem) -> Tokens:
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
class Begun:
    """A chunk whose logits are made and read, the small all-gather under way."""

    span: slice
    hidden_nD: Tensor
    """The student's."""
    tokens: Tokens
    kept: Kept | None
    reading: Reading

    def chunk(self, problem: Problem) -> Chunk:
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


def walk(problem: Problem, plan: Plan, everyone: Everyone, first_head: int = 0) -> Iterator[Begun]:
    """The chunks, in order: gathers hidden states, multiplies them with the heads, reads the softmaxes. Collective.

    The next chunk's hidden states travel while this one's products run, and this one's statistics while the next
    one's do.
    """
    vocab, targets, heads = problem.vocab, problem.targets, problem.heads[first_head:]
    n, v = len(everyone.weights_gL) * plan.tokens, vocab.true_rows
    memory = buffers.take(plan.in_flight * len(heads) * n * v, everyone.weights_gL)
    memory_ihnv = memory.view(plan.in_flight, len(heads), n, v)
    if targets is not None:
        targets = _widened(targets, plan.kept, problem.weights_N)

    def send(span: slice) -> list[Pending]:
        rows = [_own_rows(head.hidden_ND, problem.weights_N, span) for head in heads]
        if targets is not None:
            numbers = torch.cat([targets.probs, targets.log_tail.unsqueeze(1)], dim=1).to(problem.dtype)
            length = span.stop - span.start
            rows += [padded(targets.ids[span], length, -1), padded(numbers[span], length, 0)]
        return [start_all_gather_rows(each, vocab.group) for each in rows]

    spans = plan.spans()
    arriving = send(spans[0]) if spans else []
    begun: deque[Begun] = deque()
    for i, span in enumerate(spans):
        arrived = [pending.wait() for pending in arriving]
        arriving = send(spans[i + 1]) if i + 1 < len(spans) else []
        hidden = [operand(rows, problem.dtype) for rows in arrived[: len(heads)]]
        kept = None if targets is None else _kept(vocab, arrived[-2], arrived[-1], targets.tail)
        tokens = everyone.tokens(span, problem)
        logits = [
            _logits(head, hidden_nD, weight_vD, buffer_nv[: len(hidden_nD)], problem)
            for head, hidden_nD, weight_vD, buffer_nv in zip(
                heads, hidden, problem.operands[first_head:], memory_ihnv[i % plan.in_flight], strict=True
            )
        ]
        reading = Reading.start(logits, tokens.label_rows_n, vocab, kept)
        begun.append(Begun(span, hidden[0], tokens, kept, reading))
        if len(begun) == plan.in_flight:
            yield begun.popleft()
    yield from begun
    buffers.give(memory)


def _logits(head: Head, hidden_nD: Tensor, weight_vD: Tensor, out_nv: Tensor, problem: Problem) -> Logits:
    multiply(hidden_nD, weight_vD.T, out=out_nv)
    logits, transform = Logits(out_nv, problem.divergence.temperature, problem.elementwise), head.transform
    bias_v = head.bias(problem.vocab, problem.dtype)
    if bias_v is not None or transform != LogitTransform():
        for rows in logits.blocks():
            logits.stage(pointwise.transform_)(out_nv[rows], bias_v, transform.scale, transform.softcap)
    return logits


def _surest(problem: Problem, plan: Plan, everyone: Everyone) -> Tensor:
    """[g, L] bool: the labelled tokens with the lowest teacher entropy. One pass over the teacher's head."""
    entropy_gL = torch.zeros_like(everyone.weights_gL)
    for begun in walk(problem, plan, everyone, first_head=1):
        (softmax,) = begun.reading.wait(problem.vocab)
        entropy_gL[:, begun.span] = softmax.entropy_n.view(len(entropy_gL), -1)
    labelled = (everyone.weights_gL != 0) & (everyone.labels_gL != IGNORED_LABEL)
    count = (labelled.sum().double() * problem.divergence.label_fraction).floor()
    place = places(torch.where(labelled, entropy_gL, math.inf))
    return place < count


@dataclass(frozen=True)
class Gradients:
    """The group's loss, differentiated by this rank's tokens and by its rows of the student's head."""

    hidden_ND: Tensor
    """In the dtype of the hidden states: each token is written once."""
    weight_wD: Tensor
    """In the accumulator's dtype: every chunk adds to it."""
    bias_w: Tensor | None

    @classmethod
    def before(cls, head: Head, dtype: torch.dtype, *, rows: int) -> "Gradients":
        """What the first chunk writes to, and the zeros of what it does not: all but the first `rows` of the head.

        Zeros for the first chunk to add to would be one more pass over a matrix of the head's size.
        """
        bias_w = None if head.bias_w is None else torch.zeros_like(head.bias_w, dtype=dtype)
        weight_wD = torch.empty_like(head.weight_wD, dtype=dtype)
        weight_wD[rows:] = 0
        return cls(torch.empty_like(head.hidden_ND), weight_wD, bias_w)

    def add(self, slope_nv: Tensor, hidden_nD: Tensor, problem: Problem, *, first: bool) -> Pending:
        """Adds a chunk. The rows' gradient needs no collective; that of the tokens is on its way to their owners."""
        weight_vD = problem.operands[0]
        v = len(weight_vD)
        if self.bias_w is not None:
            self.bias_w[:v] += slope_nv.sum(dim=0)
        # On an accelerator a bf16 product wants a bf16 slope; its rounding is 2^-9 of each entry, without a bias.
        slope_nv = slope_nv.to(hidden_nD.dtype)
        multiply(slope_nv.T, hidden_nD, out=self.weight_wD[:v], add=not first)
        hidden_grad_nD = self.weight_wD.new_empty(hidden_nD.shape)
        multiply(slope_nv, weight_vD, out=hidden_grad_nD)
        return start_reduce_scatter_rows(hidden_grad_nD, problem.vocab.group)

    def receive(self, span: slice, arriving: Pending) -> None:
        """This rank's tokens of a chunk; what stands after its last token is dropped."""
        mine_kD = self.hidden_ND[span]
        mine_kD.copy_(arriving.wait()[: len(mine_kD)])


def _own_rows(hidden_ND: Tensor, weights_N: Tensor, span: slice) -> Tensor:
    """[k, D]: this rank's tokens of a chunk; zeros for those of weight 0, and after its last token."""
    dead_k1 = (weights_N[span] == 0).unsqueeze(1)
    return padded(hidden_ND[span].masked_fill(dead_k1, 0), span.stop - span.start, 0)


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
