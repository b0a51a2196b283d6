"""Selections to test, and sparse targets of heads or of logits themselves."""

from typing import Any

import torch
from torch import Tensor

from megadistill.loss import Head, VocabSlice
from megadistill.loss.sparse import (
    Sampled,
    SampledDistinct,
    Selection,
    Threshold,
    TopK,
    TopP,
    sparse_targets,
    uniforms_per_token,
)
from megadistill.types import SparseTargets, Tail

TAILS = [Tail.OTHER, Tail.DROPPED, Tail.RENORMALISED]
MOST_LIKELY: list[tuple[Selection, Tail]] = [
    (selection, tail)
    for selection in (TopK(1), TopK(4), TopK(64), Threshold(0.05), Threshold(0.6), TopP(0.9, 5), TopP(0.5, 100))
    for tail in TAILS
]
DISTINCT: list[tuple[Selection, Tail]] = [(SampledDistinct(k), Tail.RENORMALISED) for k in (1, 5, 64)]
CASES = [*MOST_LIKELY, *DISTINCT, (Sampled(7), Tail.RENORMALISED)]


def uniforms_for(tokens: int, selection: Selection, seed: int = 0) -> Tensor | None:
    numbers = uniforms_per_token(selection)
    if numbers == 0:
        return None
    return torch.rand(tokens, numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets_of(
    teacher: Head, selection: Selection, tail: Tail = Tail.RENORMALISED, *, size: int | None = None, **more: Any
) -> SparseTargets:
    vocab = VocabSlice.contiguous(0, teacher.weight.shape[0], size or teacher.weight.shape[0])
    return sparse_targets(teacher, selection=selection, tail=tail, vocab=vocab, **more)


def targets_of_logits(
    logits: Tensor, selection: Selection, tail: Tail = Tail.RENORMALISED, *, bias: Tensor | None = None, **more: Any
) -> SparseTargets:
    """Targets of the logits [N, V] themselves: the head's columns are the tokens' logits."""
    return targets_of(
        Head(torch.eye(len(logits), dtype=logits.dtype), logits.T.contiguous(), bias), selection, tail, **more
    )
