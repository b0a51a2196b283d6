"""Chunks in flight: hidden states gathered, multiplied with the heads, the statistics' all-gather started.

Legend: N this rank's tokens, L those of the rank that has most; g ranks of the vocab group; n tokens of a chunk (of the
whole group); D a model's width; v this rank's true rows of the vocabulary; K sparse target ids of a token.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from megadistill.distributed.collectives import Pending, all_gather_rows, group_size, start_all_gather_rows
from megadistill.loss import buffers, pointwise
from megadistill.loss.chunk import Chunk, Tokens
from megadistill.loss.heads import Head, multiply, operand, padded
from megadistill.loss.inputs import ChunkPlan, LossInputs
from megadistill.loss.softmax import Logits, PendingSoftmax, SparseSlice
from megadistill.types import IGNORED_LABEL, LogitTransform, SparseTargets


@dataclass(frozen=True)
class GroupTokens:
    """Labels and weights of all tokens of the vocab group: small enough to be on every rank at once. [g, L] each."""

    labels_gL: Tensor
    weights_gL: Tensor
    use_label_gL: Tensor
    """bool: the token learns from its label in place of the divergence."""

    @classmethod
    def gather(cls, inputs: LossInputs, plan: ChunkPlan) -> "GroupTokens":
        """Two all-gathers; a rank with fewer than L tokens is padded with tokens of weight 0."""
        group, longest = inputs.vocab.group, plan.longest
        g = group_size(group)
        # A token of weight 0 does not count; a label that its teacher does not know would cost it an infinity.
        labels_N = inputs.labels_N.masked_fill(inputs.weights_N == 0, IGNORED_LABEL)
        labels_L = padded(labels_N, longest, IGNORED_LABEL)
        weights_L = padded(inputs.weights_N.to(inputs.dtype), longest, 0)
        labels_gL = all_gather_rows(labels_L, group).view(g, longest)
        weights_gL = all_gather_rows(weights_L, group).view(g, longest)
        return cls(labels_gL, weights_gL, torch.zeros_like(labels_gL, dtype=torch.bool))

    def chunk(self, span: slice, inputs: LossInputs) -> Tokens:
        """The tokens `span` of every rank."""
        d, weights_n = inputs.divergence, self.weights_gL[:, span].flatten()
        labels_n, use_label_n = self.labels_gL[:, span].flatten(), self.use_label_gL[:, span].flatten()
        has_label_n, one = (labels_n != IGNORED_LABEL).to(weights_n.dtype), weights_n.new_ones(())
        return Tokens(
            weights_n=weights_n,
            has_label_n=has_label_n,
            label_rows_n=inputs.vocab.local_rows(labels_n),
            kd_n=torch.where(use_label_n, 0, weights_n * d.kd_factor),
            ce_n=weights_n * has_label_n * torch.where(use_label_n, d.kd_weight * one + d.ce_weight, d.ce_weight * one),
        )


@dataclass(frozen=True)
class InFlightChunk:
    """A chunk whose logits are computed, while the small all-gather of its statistics is in flight."""

    span: slice
    """Its tokens of each rank."""
    hidden_nD: Tensor
    """The first head's hidden states, of all ranks, as products take them."""
    tokens: Tokens
    targets: SparseSlice | None
    pending: PendingSoftmax

    def wait(self, inputs: LossInputs) -> Chunk:
        """The chunk with its softmaxes over the whole vocabulary."""
        student, *teacher = self.pending.wait(inputs.vocab)
        return Chunk(
            tokens=self.tokens,
            student=student,
            teacher=teacher[0] if teacher else None,
            targets=self.targets,
            divergence=inputs.divergence,
            transform=inputs.student.transform,
            vocab=inputs.vocab,
        )


def iter_chunks(
    inputs: LossInputs, plan: ChunkPlan, tokens: GroupTokens, *, K: int = 0, teacher_alone: bool = False
) -> Iterator[InFlightChunk]:
    """The chunks in order, `plan.in_flight` of them at a time. Collective.

    While the products of a chunk run, the hidden states of the next one are gathered, and the statistics of the one
    before. `K` is the largest number of sparse target ids of a token on any rank.
    """
    vocab, targets, first = inputs.vocab, inputs.targets, int(teacher_alone)
    heads, weights = inputs.heads[first:], inputs.weights[first:]
    n, v = len(tokens.weights_gL) * plan.chunk_tokens, vocab.true_rows
    one = buffers.aligned(n * v, tokens.weights_gL)
    memory = buffers.take(plan.in_flight * len(heads) * one, tokens.weights_gL)
    memory_ihnv = memory.view(plan.in_flight, len(heads), one)[:, :, : n * v].view(plan.in_flight, len(heads), n, v)
    if targets is not None:
        targets = _widened(targets, K, inputs.weights_N)

    def start_gathers(span: slice) -> list[Pending]:
        rows = [_own_rows(head.hidden, inputs.weights_N, span) for head in heads]
        if targets is not None:
            numbers = torch.cat([targets.probs, targets.log_tail.unsqueeze(1)], dim=1).to(inputs.dtype)
            length = span.stop - span.start
            rows += [padded(targets.ids[span], length, -1), padded(numbers[span], length, 0)]
        return [start_all_gather_rows(each, vocab.group) for each in rows]

    spans = plan.spans()
    gathers = start_gathers(spans[0]) if spans else []
    in_flight: deque[InFlightChunk] = deque()
    for i, span in enumerate(spans):
        gathered = [pending.wait() for pending in gathers]
        gathers = start_gathers(spans[i + 1]) if i + 1 < len(spans) else []
        hidden = [operand(rows, inputs.dtype) for rows in gathered[: len(heads)]]
        sparse = None
        if targets is not None:
            ids_nK, numbers_nK = gathered[-2:]
            sparse = SparseSlice(vocab.local_rows(ids_nK), numbers_nK[:, :-1], numbers_nK[:, -1], targets.tail)
        of_chunk = tokens.chunk(span, inputs)
        logits = [
            _logits(head, hidden_nD, weight_vD, out_nv[: len(hidden_nD)], inputs)
            for head, hidden_nD, weight_vD, out_nv in zip(
                heads, hidden, weights, memory_ihnv[i % plan.in_flight], strict=True
            )
        ]
        pending = PendingSoftmax.start(logits, of_chunk.label_rows_n, inputs.ids_v, vocab, sparse)
        in_flight.append(InFlightChunk(span, hidden[0], of_chunk, sparse, pending))
        if len(in_flight) == plan.in_flight:
            yield in_flight.popleft()
    yield from in_flight
    buffers.give(memory)


def _logits(head: Head, hidden_nD: Tensor, weight_vD: Tensor, out_nv: Tensor, inputs: LossInputs) -> Logits:
    multiply(hidden_nD, weight_vD.T, out=out_nv)
    logits = Logits(out_nv, inputs.divergence.temperature, inputs.options.elementwise.on(out_nv.device))
    bias_v = head.true_bias(inputs.vocab, inputs.dtype)
    if bias_v is not None or head.transform != LogitTransform():
        for rows in logits.blocks():
            logits.kernel(pointwise.apply_transform_)(out_nv[rows], bias_v, head.transform)
    return logits


def _own_rows(hidden_ND: Tensor, weights_N: Tensor, span: slice) -> Tensor:
    """[tokens of the span, D]: this rank's hidden states; zeros for tokens of weight 0, and after its last token."""
    dead_k1 = (weights_N[span] == 0).unsqueeze(1)
    return padded(hidden_ND[span].masked_fill(dead_k1, 0), span.stop - span.start, 0)


def _widened(targets: SparseTargets, K: int, weights_N: Tensor) -> SparseTargets:
    """The targets with K places a token; a token of weight 0 has none."""
    dead_N, missing = weights_N == 0, K - targets.ids.shape[1]
    ids_NK = targets.ids.masked_fill(dead_N.unsqueeze(1), -1)
    return replace(
        targets,
        ids=pad(ids_NK, (0, missing), value=-1),
        probs=pad(targets.probs.masked_fill(ids_NK < 0, 0), (0, missing)),
        log_tail=targets.log_tail.masked_fill(dead_N, 0),
    )
