"""Room `train`: which rank is slower than the others. It slows nothing down and ends nothing: it names.

Legend: w ranks of the student.

The time of a step names nobody: its collectives make every rank as slow as the slowest one, so all of them measure the
same. What a rank does by itself can be compared: a product of two fixed matrices, timed while no other rank is waited
for, and the time that it waits for its own data. A slow device is hot, shares its power or its cores, or is broken.
"""

import socket
import statistics
import time
from collections.abc import Sequence

import torch

from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.topology import Topology

SLOWER = 1.3
"""Times the median that a rank may take."""
IN_A_ROW = 3
"""Looks before a rank is named, and before it is named again: one may fall on a busy moment."""
WAITING_SHARE = 0.1
"""Of its time, that a rank may wait for data without being named for it."""

_HOST_BYTES = 64


class Stragglers:
    """Looks at all ranks of the student's world. Construction and each look are collective over it."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
        own = torch.frombuffer(bytearray(name), dtype=torch.uint8).unsqueeze(0).to(topology.device)
        names = all_gather_rows(own, topology.world_group).cpu()
        self._hosts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in names]
        self._slow = [0] * topology.world
        self._waiting = [0] * topology.world
        self._since = time.perf_counter()

    def look(self, data_seconds: float) -> list[str]:
        """Lines that name who is slow, the same on every rank.

        `data_seconds`: that this rank has waited for its data since the last look. Costs a few milliseconds and a
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
            lines.append(f"rank {rank} ({self._hosts[rank]}) computes at {speed:.2f} of the median")
        for rank in _lasting(self._waiting, starved(shares)):
            rest = statistics.median_low(shares)
            lines.append(
                f"rank {rank} ({self._hosts[rank]}) waits for data in {shares[rank]:.2f} of its time, the median "
                f"in {rest:.2f}"
            )
        return lines


def slow(seconds: Sequence[float]) -> set[int]:
    """Ranks that take much longer for the product than the median rank does; of two, than the other one."""
    return {rank for rank, each in enumerate(seconds) if each > SLOWER * statistics.median_low(seconds)}


def starved(shares: Sequence[float]) -> set[int]:
    """Ranks that wait for data much more than the median rank does. Where all wait, none is slower than the others."""
    return {
        rank for rank, each in enumerate(shares) if each > max(WAITING_SHARE, SLOWER * statistics.median_low(shares))
    }


def _lasting(streaks: list[int], found: set[int]) -> list[int]:
    """Counts one more look in `streaks`; the ranks for which it was each third one in a row."""
    for rank in range(len(streaks)):
        streaks[rank] = streaks[rank] + 1 if rank in found else 0
    return [rank for rank, count in enumerate(streaks) if count and count % IN_A_ROW == 0]


@torch.no_grad()
def product_seconds(device: torch.device) -> float:
    """Of a fixed product of matrices on this device: the shortest of a few, so that a busy moment does not count.

    A millisecond or two each, and 24 MiB on an accelerator. It draws no random numbers: a run with looks and one
    without are the same.
    """
    on_cpu = device.type == "cpu"
    n, dtype, products, samples = (256, torch.float32, 2, 6) if on_cpu else (2048, torch.bfloat16, 64, 4)
    left = torch.linspace(-1.0, 1.0, n * n, device=device).to(dtype).view(n, n)
    right, out = left.T.contiguous(), torch.empty_like(left)
    best = float("inf")
    for _ in range(samples + 1):  # the first one wakes the library up, and is the slowest
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
