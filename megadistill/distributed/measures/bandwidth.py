"""Measurements of a world: bandwidth between ranks, and offsets of their clocks.

Legend: w ranks of the world, l of them on a node.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, barrier
from megadistill.distributed.p2p import exchange
from megadistill.distributed.topology import Topology

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

CPU_BUFFER_BYTES, ACCELERATOR_BUFFER_BYTES = 1 << 20, 1 << 26
SAMPLES = 4
"""Repetitions of a measurement, of which the best counts, after one that opens the connections."""

Pair = tuple[int, int]


def all_reduce_bandwidth(topology: Topology) -> float | None:
    """Bandwidth (bytes/s) of the slowest link of a ring: 2(w-1)/w of the buffer in the time of an all-reduce.

    Collective over the world. None in a world of one.
    """
    if topology.shard_group is None:
        return None
    buffer = _buffer(topology.device)
    seconds = _best_seconds(lambda: dist.all_reduce(buffer, group=topology.shard_group), topology)
    return 2 * (topology.world - 1) / topology.world * buffer.numel() / seconds


def pair_bandwidths(topology: Topology, rounds: Sequence[Sequence[Pair]]) -> dict[Pair, float]:
    """Bandwidth (bytes/s, each way) between the two ranks of each pair, as the slower of the two measures it.

    The pairs of one round are measured at the same time. Collective over the world; the same on every rank.
    """
    bandwidths: dict[Pair, float] = {}
    for pairs in rounds:
        partner = next((sum(pair) - topology.rank for pair in pairs if topology.rank in pair), None)
        own = torch.tensor([[_pair_seconds(partner, topology)]], dtype=torch.float64, device=topology.device)
        seconds = all_gather_rows(own, topology.world_group).flatten().tolist()
        size = _buffer(topology.device).numel()
        bandwidths.update({pair: size / max(seconds[rank] for rank in pair) for pair in pairs})
    return bandwidths


def neighbours(world: int, local_world: int) -> list[list[Pair]]:
    """Rounds of pairs (r, s) in which a rank has one partner at most.

    First come neighbours on a ring of all ranks, which are mostly of one node; then, where there are several nodes,
    the ranks in the same place on neighbouring nodes.
    """
    rounds = _ring(world)
    nodes = world // local_world
    if nodes > 1 and local_world > 1 and world % local_world == 0:
        for pairs in _ring(nodes):
            firsts = [(a * local_world, b * local_world) for a, b in pairs]
            rounds.append([(a + place, b + place) for a, b in firsts for place in range(local_world)])
    return rounds


def _ring(n: int) -> list[list[Pair]]:
    """The pairs of neighbours on a ring of n, dealt out to two rounds, or three where their number is odd."""
    if n < 3:
        return [[(0, 1)]] if n == 2 else []
    pairs = [*((place, place + 1) for place in range(n - 1)), (0, n - 1)]
    even = n - n % 2
    rounds = [pairs[0:even:2], pairs[1:even:2], pairs[even:]]
    return [each for each in rounds if each]


def clock_offsets(topology: Topology) -> list[float]:
    """How far (s) each rank's clock is ahead of rank 0's, up to the jitter of a barrier. Collective over the world."""
    times = []
    for _ in range(SAMPLES):
        barrier(topology.world_group)
        times.append(time.time())
    own = torch.tensor([times], dtype=torch.float64, device=topology.device)
    ahead = all_gather_rows(own, topology.world_group).cpu()
    ahead = ahead - ahead[:1]
    closest = ahead.abs().argmin(dim=1, keepdim=True)
    offsets: list[float] = ahead.gather(1, closest).flatten().tolist()
    return offsets


def _pair_seconds(partner: int | None, topology: Topology) -> float:
    """Time (s) of an exchange with `partner`; 0 without one: such a rank takes part in the barriers only."""
    sent = _buffer(topology.device)
    received = torch.empty_like(sent)

    def work() -> None:
        if partner is not None:
            exchange(sent, received, partner, topology.shard_group)  # doctor has one replica: the world

    seconds = _best_seconds(work, topology)
    return seconds if partner is not None else 0.0


def _best_seconds(work: Callable[[], object], topology: Topology) -> float:
    best = float("inf")
    for sample in range(SAMPLES + 1):
        barrier(topology.world_group)
        began = time.perf_counter()
        work()
        if topology.device.type != "cpu":
            torch.accelerator.synchronize(topology.device)
        if sample > 0:
            best = min(best, time.perf_counter() - began)
    return best


def _buffer(device: torch.device) -> Tensor:
    size = CPU_BUFFER_BYTES if device.type == "cpu" else ACCELERATOR_BUFFER_BYTES
    return torch.zeros(size, dtype=torch.uint8, device=device)
