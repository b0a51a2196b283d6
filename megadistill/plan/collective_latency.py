"""Latency of a step's collectives: the time beyond their bytes, and the part of it that compute does not hide.

The published model is that by which NCCL chooses its algorithms: rings for all-gathers and reduce-scatters, rings or
trees for all-reduces, each by three protocols (LL, LL128, Simple) with a latency a hop and a share of the bandwidth.
The constants are those of NCCL 2.30.7 (src/graph/tuning.cc, `ncclTunerConstantsDefaults` and `ncclTopoTuneModel`). Left
out are what needs hardware in the switches (NVLS between nodes, CollNet) and PAT, which serves one rank a node.

Where `megadistill doctor` has measured small collectives on a cluster, their times replace the model's scale.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from megadistill.accelerators import Accelerator
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.step_collectives import (
    ALL_REDUCE,
    Collective,
    Hidden,
    StepCollectives,
    count_collectives,
)
from megadistill.plan.throughput import StepTimes

SOURCE = "NCCL 2.30.7"
"""Version of the published constants."""

MICROSECOND = 1e-6
GIGABYTE = 1e9

NVLINK_GB_PER_S = 100.0
"""GB/s within a node from which the constants are NVLink's, not PCIe's."""
MOST_NODES = 1 << 20
"""Nodes up to which the border is looked for at which latency passes compute."""


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's protocols under one algorithm. Times in microseconds.

    Attributes:
        base: of a call.
        nvlink: a hop in a node, over NVLink.
        pcie: the same over PCIe.
        network: a hop between nodes.
        overhead: least time of a hop of a ring that leaves nodes.
        bandwidth: share of the links' bandwidth.
        needs_nvlink: whether it is off without NVLink.
    """

    base: float
    nvlink: float
    pcie: float
    network: float
    overhead: float
    bandwidth: float
    needs_nvlink: bool = False


RING = {
    "LL": Protocol(6.6, 0.6, 1.0, 2.7, 1.0, 0.5),
    "LL128": Protocol(14.0, 1.9, 2.5, 4.0, 1.0, 0.92, needs_nvlink=True),
    "Simple": Protocol(8.4, 3.4, 5.7, 14.0, 3.0, 1.0),
}
TREE = {
    "LL": Protocol(6.8, 0.6, 1.0, 5.0, 0.0, 0.92 / 3.8),
    "LL128": Protocol(14.0, 1.25, 1.9, 8.5, 0.0, 0.92 * 0.9375, needs_nvlink=True),
    "Simple": Protocol(8.4, 4.0, 4.0, 14.0, 0.0, 0.92),
}
LL_GB_PER_S = {1: 141.0, 2: 39.0, 3: 20.4}
"""Nodes (3: more) -> the most that LL reaches, GB/s of a node."""


class Links(NamedTuple):
    """A cluster's links."""

    node: float
    """Bytes/s of a rank within its node."""
    network: float
    """Bytes/s of a rank to other nodes."""

    @property
    def has_nvlink(self) -> bool:
        return self.node >= NVLINK_GB_PER_S * GIGABYTE

    def usable(self, protocols: dict[str, Protocol]) -> list[tuple[str, Protocol]]:
        return [(name, each) for name, each in protocols.items() if self.has_nvlink or not each.needs_nvlink]

    def hop(self, protocol: Protocol) -> float:
        return protocol.nvlink if self.has_nvlink else protocol.pcie

    def transfer(self, kind: str, ranks: int, nodes: int, nbytes: int) -> float:
        """Seconds of bytes, as `plan.counts.traffic` counts them: one in `ranks / nodes` links of a ring leaves."""
        received = (2 if kind == ALL_REDUCE else 1) * nbytes * (ranks - 1) / ranks
        network = received * nodes / ranks if nodes > 1 else 0.0
        return max((received - network) / self.node, network / self.network)


@lru_cache(maxsize=1 << 16)
def published_latency(links: Links, kind: str, ranks: int, nodes: int, nbytes: int) -> float:
    """Seconds of a call beyond its bytes: the fastest protocol's latency, and what it loses of the bandwidth."""
    ideal = links.transfer(kind, ranks, nodes, nbytes)
    times = []
    for name, protocol in links.usable(RING):
        transfer = ideal / protocol.bandwidth
        if name == "LL":
            transfer = max(transfer, nbytes / (LL_GB_PER_S[min(nodes, 3)] * GIGABYTE))
        times.append(_ring(links, name, kind, ranks, nodes) + transfer)
    if kind == ALL_REDUCE:
        times += [_tree(links, each, ranks, nodes) + ideal / each.bandwidth for _, each in links.usable(TREE)]
    return min(times) - ideal


def _ring(links: Links, name: str, kind: str, ranks: int, nodes: int) -> float:
    protocol, rounds = RING[name], 2 if kind == ALL_REDUCE else 1
    between = rounds * (nodes - 1)
    hop = links.hop(protocol) if nodes == 1 else max(links.hop(protocol), protocol.overhead)
    network = TREE[name].network if ranks == nodes else protocol.network  # one rank a node: as a tree's
    return MICROSECOND * (protocol.base + (rounds * (ranks - 1) - between) * hop + between * network)


def _tree(links: Links, protocol: Protocol, ranks: int, nodes: int) -> float:
    levels = nodes.bit_length() - 1
    return MICROSECOND * (protocol.base + 2 * ((ranks // nodes - 1) * links.hop(protocol) + levels * protocol.network))


@dataclass(frozen=True)
class LatencyModel:
    """Latencies of collectives on a cluster's nodes."""

    accelerator: Accelerator
    ranks_per_node: int

    @cached_property
    def links(self) -> Links:
        return Links(self.accelerator.node_bandwidth, self.accelerator.network_bandwidth)

    @property
    def is_measured(self) -> bool:
        return bool(self.accelerator.latency_us)

    def seconds(self, call: Collective) -> float:
        """Time of a call beyond its bytes over the bandwidth of the links."""
        return self._scale(call) * published_latency(self.links, call.kind, call.ranks, call.nodes, call.nbytes)

    def transfer(self, call: Collective) -> float:
        """Time of a call's bytes at the bandwidth of the links."""
        return self.links.transfer(call.kind, call.ranks, call.nodes, call.nbytes)

    def _scale(self, call: Collective) -> float:
        """The measured latency of this kind over the nearest number of ranks, against the published model."""
        measured = self.accelerator.latency_us.get("all_reduce" if call.kind == ALL_REDUCE else "all_gather")
        if not measured:
            return 1.0
        ranks = min(measured, key=lambda each: max(each, call.ranks) / min(each, call.ranks))
        nodes = -(-ranks // self.ranks_per_node)
        return measured[ranks] * MICROSECOND / published_latency(self.links, call.kind, ranks, nodes, 0)


Busy = dict[Hidden, float]
"""Seconds by what may run at the same time: latency, with the bytes of calls that compute may hide."""


@dataclass(frozen=True)
class CollectiveTimes:
    """Times of the collectives of an optimizer step by themselves."""

    collectives: StepCollectives
    model: LatencyModel

    @cached_property
    def busy(self) -> tuple[Busy, Busy, Busy]:
        """Times of the first micro-step, of each further one, and of the calls once a step."""
        first, later, once = map(self._busy, _parts(self.collectives))
        return first, later, once

    def _busy(self, calls: Sequence[Collective]) -> Busy:
        busy = dict.fromkeys(Hidden, 0.0)
        for call, count in Counter(calls).items():
            hidden = call.hidden_behind is not Hidden.NOTHING
            seconds = self.model.seconds(call) + (self.model.transfer(call) if hidden else 0.0)
            busy[call.hidden_behind] += count * seconds
        return busy


def collective_times(run: Sharding, accelerator: Accelerator) -> CollectiveTimes:
    """Times of the collectives of a run's step."""
    return CollectiveTimes(count_collectives(run), LatencyModel(accelerator, run.ranks_per_node))


@dataclass(frozen=True)
class StepLatency:
    """Latency of the collectives of an optimizer step, beside its compute."""

    alone: CollectiveTimes
    times: StepTimes
    """Compute and bytes, without latency."""

    @property
    def collectives(self) -> StepCollectives:
        return self.alone.collectives

    @property
    def model(self) -> LatencyModel:
        return self.alone.model

    @cached_property
    def calls(self) -> int:
        return sum(1 for _ in self.collectives)

    @cached_property
    def together(self) -> float:
        """Seconds of all calls of a step, hidden or not."""
        return self._total(self.collectives)

    @cached_property
    def exposed(self) -> float:
        """Seconds of a micro-step, in the mean of a step, that compute does not hide."""
        accumulation = self.collectives.accumulation
        first, later, once = (self._exposed(busy) for busy in self.alone.busy)
        micro_steps = (first[0] + (accumulation - 1) * later[0] + once[0]) / accumulation
        waited = (first[1] + (accumulation - 1) * later[1] + once[1]) / accumulation
        return max(waited, micro_steps - self.times.exposed)

    @cached_property
    def ranks_at_compute(self) -> int | None:
        """The student's ranks from which latency takes longer than the compute of a step; None: beyond any cluster.

        The same student, micro-batch and nodes; hidden or not.
        """
        compute = self.collectives.accumulation * self.times.compute
        per_node = self.model.ranks_per_node

        def passes(nodes: int) -> bool:
            return self._total(self._on(nodes * per_node)) > compute

        low, high = 0, 1
        while not passes(high):
            low, high = high, 2 * high
            if high > MOST_NODES:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if passes(middle) else (middle, high)
        return high * per_node

    def _on(self, ranks: int) -> StepCollectives:
        """The same calls where the world has other ranks."""
        times = ranks / self.times.students

        def scaled(calls: Iterable[Collective]) -> tuple[Collective, ...]:
            return tuple(
                replace(call, ranks=max(1, round(times * call.ranks)), nodes=max(1, round(times * call.nodes)))
                if call.spans_world
                else call
                for call in calls
            )

        first, later, once = (scaled(calls) for calls in _parts(self.collectives))
        return StepCollectives(self.collectives.accumulation, first, later, once)

    def _total(self, collectives: StepCollectives) -> float:
        first, later, once = (sum(map(self.model.seconds, calls)) for calls in _parts(collectives))
        return first + (collectives.accumulation - 1) * later + once

    def _exposed(self, busy: Busy) -> tuple[float, float]:
        """Seconds that compute does not hide, and of them those that nothing hides."""
        waited = busy[Hidden.NOTHING]
        forward, backward = busy[Hidden.FORWARD], busy[Hidden.BACKWARD]
        return waited + max(0.0, forward - self.times.forward) + max(0.0, backward - self.times.backward), waited


def _parts(collectives: StepCollectives) -> tuple[Sequence[Collective], ...]:
    return collectives.first, collectives.later, collectives.once
