"""Histograms of tensors that are sharded over the ranks, as the student's weights are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum
from megadistill.distributed.topology import Topology

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """The distribution of a tensor's elements in `BINS` equal bins between the lowest and the highest."""

    lowest: float
    highest: float
    sum: float
    sum_squares: float
    counts: list[float]

    @property
    def limits(self) -> list[float]:
        """Upper end of each bin."""
        width = (self.highest - self.lowest) / len(self.counts)
        return [self.lowest + width * (bin + 1) for bin in range(len(self.counts) - 1)] + [self.highest]


@torch.no_grad()
def histograms(pieces: Mapping[str, Tensor], topology: Topology) -> dict[str, Histogram]:
    """Histograms by name of tensors of which every rank holds a flat shard, which may be empty. Collective.

    Every rank passes the same names in the same order. Two small collectives for any number of tensors. Non-finite
    elements are left out, and so are tensors without finite ones.
    """
    finite = [piece[piece.isfinite()].to(topology.device, torch.float32) for piece in pieces.values()]
    infinity = torch.tensor(torch.inf, device=topology.device)
    # One maximum for both ends: the lowest is the negated maximum of the negated elements.
    ends = [torch.stack([(-p).max(), p.max()] if p.numel() else [-infinity, -infinity]) for p in finite]
    gathered = all_gather_rows(torch.stack(ends).unsqueeze(0), topology.world_group)
    negated, highest = gathered.amax(dim=0).unbind(dim=1)
    sums = torch.stack(
        [_sums(p, float(-n), float(h)) for p, n, h in zip(finite, negated.tolist(), highest.tolist(), strict=True)]
    )
    all_reduce_sum(sums, topology.world_group)
    return {
        name: Histogram(-low, high, total, squares, counts)
        for name, low, high, (total, squares, *counts) in zip(
            pieces, negated.tolist(), highest.tolist(), sums.tolist(), strict=True
        )
        if sum(counts) > 0
    }


def histogram(values: Sequence[float]) -> Histogram:
    """The histogram of finite numbers, one at least, that every rank knows."""
    lowest, highest = min(values), max(values)
    total, squares, *counts = _sums(torch.tensor(values), lowest, highest).tolist()
    return Histogram(lowest, highest, total, squares, counts)


def _sums(piece: Tensor, lowest: float, highest: float) -> Tensor:
    """[2 + BINS] float64: the sum, the sum of squares, the number of elements in each bin."""
    wide = piece.double()
    counts = torch.zeros(BINS, dtype=torch.float64, device=piece.device)
    if piece.numel() and lowest < highest:
        counts = torch.histc(piece, BINS, min=lowest, max=highest).double()
    elif piece.numel():
        counts[0] = piece.numel()
    return torch.cat([torch.stack([wide.sum(), wide.square().sum()]), counts])
