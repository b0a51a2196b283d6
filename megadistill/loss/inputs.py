"""A call of the loss: its arguments, what must fit, and what the ranks agree on before the first chunk.

Legend: N this rank's tokens, L those of the rank that has most; g ranks of the vocab group; k tokens that each of them
gives to a chunk; v this rank's true rows of the vocabulary; K ids kept of a token.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.divergence import Divergence, Elementwise
from megadistill.loss.heads import Head
from megadistill.types import IGNORED_LABEL, SparseTargets


@dataclass(frozen=True)
class Problem:
    """The arguments of a call, and what follows from them."""

    heads: tuple[Head, ...]
    labels_N: Tensor
    weights_N: Tensor
    divergence: Divergence
    vocab: VocabSlice
    logit_memory: int
    elementwise: Elementwise
    targets: SparseTargets | None = None
    diagnose: bool = False

    def __post_init__(self) -> None:
        tokens = self.labels_N.shape[0]
        for head in self.heads:
            head.require_fit(tokens, self.vocab)
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
    def student(self) -> Head:
        return self.heads[0]

    @cached_property
    def operands(self) -> tuple[Tensor, ...]:
        """[v, D] of each head."""
        return tuple(head.rows(self.vocab, self.dtype) for head in self.heads)


@dataclass(frozen=True)
class Plan:
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


def agree(problem: Problem, *, with_gradient: bool) -> Plan:
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
    return Plan(longest, math.ceil(longest / max(1, chunks)) or 1, in_flight, int(max(kepts)))
