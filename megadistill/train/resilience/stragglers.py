"""Detection of slow ranks; only reports them.

Step times cannot be compared, since collectives make every rank as slow as the slowest. What a rank does by itself can:
a fixed matrix product, and the time that it waits for its own data. A slow device is hot, shares its power or its
cores, or is broken.
"""

import socket
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from megadistill.distributed.collectives import all_gather_objects, all_gather_rows
from megadistill.distributed.topology import Topology
from megadistill.timeline.clock import clock_for

SLOWER = 1.3
"""Multiple of the median time above which a rank is slow."""
IN_A_ROW = 3
"""Consecutive checks after which a slow rank is reported, and reported again."""
WAITING_SHARE = 0.1
"""Fraction of its time that a rank may wait for data before it is reported."""
MAX_NAMED = 8
"""Ranks that one check names for each reason, the slowest first: half of a large world may be slow at once."""


class Stragglers:
    """Compares the ranks of the student's world. Construction and each check are collective over it."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._hosts = all_gather_objects(socket.gethostname(), topology.world_group)
        self._slow = np.zeros(topology.world, np.int64)
        self._waiting = np.zeros(topology.world, np.int64)
        self._since = time.perf_counter()

    def check(self, data_seconds: float) -> list[str]:
        """Log lines that name the slow ranks, the same on every rank.

        `data_seconds`: time that this rank has waited for data since the last check. Costs the timed products and a
        collective of 16 bytes a rank; what is computed from it takes under a millisecond at thousands of ranks.
        """
        now = time.perf_counter()
        share = data_seconds / max(now - self._since, 1e-9)
        own = torch.tensor([[product_seconds(self._topology.device), share]], dtype=torch.float64)
        gathered = all_gather_rows(own.to(self._topology.device), self._topology.world_group)
        seconds, shares = gathered.T.cpu().numpy()
        self._since = time.perf_counter()
        lines = []
        if ranks := _lasting(self._slow, slow(seconds)):
            middle = _median(seconds)
            ranks.sort(key=lambda rank: -seconds[rank])
            for rank in ranks[:MAX_NAMED]:
                speed = middle / seconds[rank]
                lines.append(f"{self._name(rank)} computes at {speed:.2f} of the median speed")
            lines += _others(ranks, "compute slower than the median")
        if ranks := _lasting(self._waiting, starved(shares)):
            middle = _median(shares)
            ranks.sort(key=lambda rank: -shares[rank])
            for rank in ranks[:MAX_NAMED]:
                waits = f"waits for data {shares[rank]:.0%} of its time, the median rank {middle:.0%}"
                lines.append(f"{self._name(rank)} {waits}")
            lines += _others(ranks, "wait for data more than the median")
        return lines

    def _name(self, rank: int) -> str:
        return f"straggler: rank {rank} ({self._hosts[rank]})"


def slow(seconds: ArrayLike) -> set[int]:
    """Ranks whose product takes longer than `SLOWER` times the median; of two ranks, the other one's."""
    return _above(seconds, 0.0)


def starved(shares: ArrayLike) -> set[int]:
    """Ranks that wait for data much more than the median rank does."""
    return _above(shares, WAITING_SHARE)


def _above(values: ArrayLike, least: float) -> set[int]:
    """Ranks above both `SLOWER` times the median and `least`. One partition, whatever the number of ranks."""
    values_W = np.asarray(values, np.float64)
    return set(np.flatnonzero(values_W > max(least, SLOWER * _median(values_W))).tolist())


def _median(values_W: NDArray[np.float64]) -> float:
    """The lower one of two medians, so that one of two ranks can be slow."""
    middle = (len(values_W) - 1) // 2
    return float(np.partition(values_W, middle)[middle])


def _lasting(streaks_W: NDArray[np.int64], now: set[int]) -> list[int]:
    """Updates `streaks_W` by one check; the ranks whose streak is a multiple of `IN_A_ROW`."""
    ranks = np.fromiter(now, np.int64, len(now))
    streaks = streaks_W[ranks] + 1
    streaks_W.fill(0)
    streaks_W[ranks] = streaks
    return sorted(ranks[streaks % IN_A_ROW == 0].tolist())


def _others(ranks: Sequence[int], what: str) -> list[str]:
    """A line that counts the ranks that have no line of their own."""
    return [f"straggler: {len(ranks) - MAX_NAMED} more ranks {what}"] if len(ranks) > MAX_NAMED else []


@torch.no_grad()
def product_seconds(device: torch.device) -> float:
    """The shortest of a few timings of a fixed matrix product on this device, by its own clock.

    A millisecond or two each, and 24 MiB on an accelerator, where it does not count what the device does before it, nor
    a host that is late: the products are queued at once. Draws no random numbers, so that a run is the same without.
    """
    clock = clock_for(device)
    on_cpu = device.type == "cpu"
    n, dtype, products, samples = (256, torch.float32, 2, 6) if on_cpu else (2048, torch.bfloat16, 64, 4)
    left = torch.linspace(-1.0, 1.0, n * n, device=device).to(dtype).view(n, n)
    right, out = left.T.contiguous(), torch.empty_like(left)
    moments = [clock.moment()]
    for _ in range(samples + 1):  # the first one initializes the library
        for _ in range(products):
            torch.mm(left, right, out=out)
        moments.append(clock.moment())
    return min(clock.between(begin, end) for begin, end in pairwise(moments))
