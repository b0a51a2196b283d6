"""Room `comm`: how fast the ranks of a world reach each other. It judges no one, and knows no model.

Legend: w ranks of the world, l of them on a node.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, barrier
from megadistill.distributed.topology import Topology

WAITS_FOR_RANKS = True
"""The hang detector takes a frame of this module for a wait."""

BUFFER_BYTES = {"cpu": 1 << 20}
ACCELERATOR_BUFFER_BYTES = 1 << 26
SAMPLES = 4
"""Of each measurement; the best one counts, and the first one, which connects, does not."""

Pair = tuple[int, int]


def all_reduce_bandwidth(topology: Topology) -> float | None:
    """Bytes a second over the slowest link of a ring: 2(w-1)/w of the buffer in the time that the sum took.

    Collective over the world. None in a world of one.
    """
    if topology.world_group is None:
        return None
    buffer = _buffer(topology.device)
    seconds = _best_seconds(lambda: dist.all_reduce(buffer, group=topology.world_group), topology)
    return 2 * (topology.world - 1) / topology.world * buffer.numel() / seconds


def pair_bandwidths(topology: Topology, rounds: Sequence[Sequence[Pair]]) -> dict[Pair, float]:
    """Bytes a second each way of each pair of ranks that send to each other, as the slower of the two measures it.

    The pairs of one round are measured at the same time. Collective over the world; the same on every rank.
    """
    found: dict[Pair, float] = {}
    for pairs in rounds:
        partner = next((sum(pair) - topology.rank for pair in pairs if topology.rank in pair), None)
        own = torch.tensor([[_pair_seconds(partner, topology)]], dtype=torch.float64, device=topology.device)
        seconds = all_gather_rows(own, topology.world_group).flatten().tolist()
        size = _buffer_bytes(topology.device)
        found.update({pair: size / max(seconds[rank] for rank in pair) for pair in pairs})
    return found


def neighbours(world: int, local_world: int) -> list[list[Pair]]:
    """Rounds of pairs (r, s), in each of which a rank has one partner at most: neighbours in rank on a ring, which are
    mostly of one node, then the ranks in the same place on neighbouring nodes, where there are several."""
    rounds = [[(pair[0], pair[1]) for pair in matching] for matching in _ring(list(range(world)))]
    nodes = world // local_world
    if nodes > 1 and local_world > 1 and world % local_world == 0:
        for matching in _ring(list(range(nodes))):
            between = [
                (min(a, b) * local_world + place, max(a, b) * local_world + place)
                for a, b in matching
                for place in range(local_world)
            ]
            rounds.append(between)
    return rounds


def _ring(places: list[int]) -> list[list[Pair]]:
    """The pairs of neighbours on a ring, dealt out to two rounds, or three where their number is odd."""
    n = len(places)
    pairs = [(min(a, b), max(a, b)) for a, b in zip(places, places[1:] + places[:1], strict=True)]
    if n < 3:
        return [pairs[:1]] if n == 2 else []
    even = n - n % 2
    rounds = [pairs[0:even:2], pairs[1:even:2], pairs[even:]]
    return [each for each in rounds if each]


def clock_offsets(topology: Topology) -> list[float]:
    """Seconds that each rank's clock is ahead of rank 0's, but for how unevenly a barrier lets them go. Collective."""
    looks = []
    for _ in range(SAMPLES):
        barrier(topology.world_group)
        looks.append(time.time())
    own = torch.tensor([looks], dtype=torch.float64, device=topology.device)
    ahead = all_gather_rows(own, topology.world_group).cpu()
    ahead = ahead - ahead[:1]
    closest = ahead.abs().argmin(dim=1, keepdim=True)
    offsets: list[float] = ahead.gather(1, closest).flatten().tolist()
    return offsets


def gathered_texts(text: str, topology: Topology) -> list[str]:
    """The text of every rank, in rank order, on every rank. Collective over the world."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = all_gather_rows(torch.tensor([len(own)], device=topology.device), topology.world_group).tolist()
    padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own))).unsqueeze(0)
    rows = all_gather_rows(padded.to(topology.device), topology.world_group).cpu()
    return [row[:length].numpy().tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def _pair_seconds(partner: int | None, topology: Topology) -> float:
    """0 for a rank that has no partner; it keeps the beat of the others."""
    sent = _buffer(topology.device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        if partner is not None:
            both = [
                dist.P2POp(dist.isend, sent, group=topology.world_group, group_peer=partner),
                dist.P2POp(dist.irecv, received, group=topology.world_group, group_peer=partner),
            ]
            for work in dist.batch_isend_irecv(both):
                work.wait()

    seconds = _best_seconds(exchange, topology)
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
    return torch.zeros(_buffer_bytes(device), dtype=torch.uint8, device=device)


def _buffer_bytes(device: torch.device) -> int:
    return BUFFER_BYTES.get(device.type, ACCELERATOR_BUFFER_BYTES)
