"""Sums of per-token results by source, by confidence and by decile of the teacher's entropy.

All sums are float64, so the number of ranks that share the tokens changes their rounding alone.

Legend: N tokens of this rank, n of a batch, K sources, C columns of sums, M tokens of all ranks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.loss import TokenTerms
from megadistill.types import DECILES

BINS = 21
"""Equal bins of the top-1 probability, as in the calibration errors of arXiv:2503.16870."""
COLUMNS = ("tokens", "cross_entropy", "kl", "jsd", "agreement", "acceptance", "teacher_cross_entropy")
OF_TEACHER = ("kl", "jsd", "agreement", "acceptance", "cross_entropy")
"""The terms of `AgainstTeacher` that the last columns are sums of."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Totals:
    """Sums over the tokens of all ranks."""

    by_source_KC: Floats
    """Sums of `COLUMNS`; 0 where there is no teacher."""
    by_bin_KB3: Floats
    """Tokens, confidence, and labels that were the most likely token, by source and bin of confidence."""
    by_decile_D4: Floats
    """Tokens, cross-entropy, KL and agreement by decile."""


class Accumulator:
    """Sums of one model's results on this rank's tokens."""

    def __init__(self, sources: int, *, keeps_tokens: bool = True) -> None:
        """`keeps_tokens`: keeps 12 bytes of each token that has a teacher until `totals`, which the deciles need."""
        self._keeps_tokens = keeps_tokens
        self._sums_KC = np.zeros((sources, len(COLUMNS)))
        self._bins_KB3 = np.zeros((sources, BINS, 3))
        self._per_token: list[NDArray[np.float32]] = []

    def add(self, terms: TokenTerms, source: int) -> None:
        """Adds the tokens of a batch, all of one source."""
        cross_entropy_n, confidence_n, correct_n = map(_host, (terms.cross_entropy, terms.confidence, terms.correct))
        self._sums_KC[source, :2] += len(cross_entropy_n), cross_entropy_n.sum()
        # A NaN counts in some bin: the cross-entropy, which is NaN too, is checked.
        bins_n = np.nan_to_num(confidence_n * BINS).astype(np.int64).clip(0, BINS - 1)
        for column, weights in enumerate((None, confidence_n, correct_n)):
            self._bins_KB3[source, :, column] += np.bincount(bins_n, weights, minlength=BINS)
        if terms.teacher is not None:
            against_5n = np.stack([_host(getattr(terms.teacher, name)) for name in OF_TEACHER])
            self._sums_KC[source, 2:] += against_5n.sum(axis=1)
            if self._keeps_tokens:
                self._per_token.append(np.stack([cross_entropy_n, against_5n[0], against_5n[2]]).astype(np.float32))

    def totals(self, decile_N: NDArray[np.int64] | None, topology: Topology) -> Totals:
        """Sums over all ranks. `decile_N`: decile of each token of this rank, in the order of `add`. Collective."""
        by_decile_D4 = np.zeros((DECILES, 4))
        if decile_N is not None:
            by_decile_D4[:, 0] = np.bincount(decile_N, minlength=DECILES)
            for column, values_N in enumerate(np.concatenate([np.empty((3, 0)), *self._per_token], axis=1), start=1):
                by_decile_D4[:, column] = np.bincount(decile_N, values_N, minlength=DECILES)
        parts = (self._sums_KC, self._bins_KB3, by_decile_D4)
        own = (torch.from_numpy(part).to(topology.device) for part in parts)
        return Totals(*(_host(all_reduce_sum(part, topology.world_group)) for part in own))


@dataclass(frozen=True)
class Deciles:
    """Deciles of all tokens by the teacher's entropy."""

    decile_N: NDArray[np.int64]
    """[N] decile of each of this rank's tokens; 0 has the lowest entropy."""
    bounds: tuple[tuple[float, float] | None, ...]
    """[DECILES] lowest and highest entropy of each; None where it has no token."""


def entropy_deciles(entropies: Sequence[Tensor], topology: Topology) -> Deciles:
    """Exact deciles from the teacher's entropies [n] of each of this rank's batches; equal ones stay in order.

    A rank's tokens come after those of the ranks before it. Collective; takes 20 bytes a token of all ranks, on each.
    """
    own_N = torch.cat([torch.empty(0), *(values.float().cpu() for values in entropies)])
    counts = all_gather_rows(torch.tensor([len(own_N)], device=topology.device), topology.world_group).tolist()
    padded = torch.nn.functional.pad(own_N, (0, max(counts) - len(own_N))).to(topology.device)
    rows = all_gather_rows(padded, topology.world_group).view(len(counts), -1).cpu()
    entropy_M = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)]).numpy()
    M, order_M = len(entropy_M), np.argsort(entropy_M, kind="stable")
    of_token_M = np.empty(M, dtype=np.int64)
    of_token_M[order_M] = np.arange(M) * DECILES // max(1, M)
    edges = [-(-M * part // DECILES) for part in range(DECILES + 1)]
    bounds = tuple(
        (float(entropy_M[order_M[start]]), float(entropy_M[order_M[stop - 1]])) if start < stop else None
        for start, stop in itertools.pairwise(edges)
    )
    first = sum(counts[: topology.rank])
    return Deciles(of_token_M[first : first + len(own_N)], bounds)


def _host(values: Tensor) -> Floats:
    return values.double().cpu().numpy()
