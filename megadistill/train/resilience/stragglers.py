"""Detection of slow ranks; only reports them.

Step times cannot be compared, since collectives make every rank as slow as the slowest. What a rank does by itself can:
a fixed matrix product, and the time that it waits for its own data. A slow device is hot, shares its power or its
cores, or is broken.
"""

import socket
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import torch

from megadistill.distributed.collectives import all_gather_objects, all_gather_rows
from megadistill.distributed.topology import Topology
from megadistill.timeline.clock import clock_for

SLOWER = 1.3
"""Multiple of the median time above which a rank is slow."""
IN_A_ROW = 3
"""Consecutive checks after which a slow rank is reported, and reported again."""
WAITING_SHARE = 0.1
"""Fraction of its time that a rank may wait for data before it is reported."""


class Stragglers:
    """Compares the ranks of the student's world. Construction and each check are collective over it."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._hosts = all_gather_objects(socket.gethostname(), topology.world_group)
        self._slow = [0] * topology.world
        self._waiting = [0] * topology.world
        self._since = time.perf_counter()

    def check(self, data_seconds: float) -> list[str]:
        """Log lines that name the slow ranks, the same on every rank.

        `data_seconds`: time that this rank has waited for data since the last check. Costs a few milliseconds and a
        collective of 16 bytes a rank.
        """
        now = time.perf_counter()
        share = data_seconds / max(now - self._since, 1e-9)
        own = torch.tensor([[product_seconds(self._topology.device), share]], dtype=torch.float64)
        seconds, shares = all_gather_rows(own.to(self._topology.device), self._topology.world_group).T.tolist()
        self._since = time.perf_counter()
        lines = []
        for rank in _lasting(self._slow, slow(seconds)):
            speed = statistics.median_low(seconds) / seconds[rank]
            lines.append(f"straggler: rank {rank} ({self._hosts[rank]}) computes at {speed:.2f} of the median speed")
        for rank in _lasting(self._waiting, starved(shares)):
            rest = statistics.median_low(shares)
            lines.append(
                f"straggler: rank {rank} ({self._hosts[rank]}) waits for data {shares[rank]:.0%} of its time, the "
                f"median rank {rest:.0%}"
            )
        return lines


def slow(seconds: Sequence[float]) -> set[int]:
    """Ranks whose product takes longer than `SLOWER` times the median; of two ranks, the other one's."""
    return {rank for rank, each in enumerate(seconds) if each > SLOWER * statistics.median_low(seconds)}


def starved(shares: Sequence[float]) -> set[int]:
    """Ranks that wait for data much more than the median rank does."""
    return {
        rank for rank, each in enumerate(shares) if each > max(WAITING_SHARE, SLOWER * statistics.median_low(shares))
    }


def _lasting(streaks: list[int], now: set[int]) -> list[int]:
    """Updates `streaks` by one check; the ranks whose streak is a multiple of `IN_A_ROW`."""
    for rank in range(len(streaks)):
        streaks[rank] = streaks[rank] + 1 if rank in now else 0
    return [rank for rank, count in enumerate(streaks) if count and count % IN_A_ROW == 0]


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
