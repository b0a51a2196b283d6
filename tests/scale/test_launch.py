"""Starting 4,096 ranks: process groups, the watchdog's messages, exit codes of the ranks and checks of the nodes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist

from megadistill.distributed.topology import Topology
from megadistill.distributed.watchdog.diagnosis import HangDetector, Heartbeat
from megadistill.distributed.watchdog.relay import Relay
from megadistill.distributed.watchdog.watchdog import Watchdog
from tests.scale.fake_world import LOCAL_WORLD, in_fake_world

WORLD = 4096


def _groups(topology: Topology) -> dict[str, list[int]]:
    """The ranks of each group that this rank is in."""
    groups = {
        "world": topology.world_group,
        "vocab": topology.vocab_group,
        "slice": topology.slice_group,
        "pipeline": topology.pipeline_group,
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


@pytest.mark.parametrize("rank", [0, 2051, WORLD - 1])
def test_groups_of_4096_ranks(rank: int) -> None:
    groups = in_fake_world(WORLD, _groups, rank=rank)
    first, place = rank - rank % LOCAL_WORLD, rank % LOCAL_WORLD
    node = list(range(first, first + LOCAL_WORLD))
    assert groups == {
        "world": list(range(WORLD)),
        "vocab": node,
        "slice": list(range(place, WORLD, LOCAL_WORLD)),
        "pipeline": node,
    }


def _groups_made(topology: Topology) -> int:
    """Process groups of the launch, those of other ranks included, for which each rank calls `new_group`."""
    return dist.distributed_c10d._world.group_count


@pytest.mark.parametrize("world", [16, 512, WORLD])
def test_calls_of_new_group_grow_with_nodes(world: int) -> None:
    """A vocab group and a pipeline for each p ranks, p slice groups, and the world."""
    assert in_fake_world(world, _groups_made) == 1 + 2 * world // LOCAL_WORLD + LOCAL_WORLD


class CountingStore:
    """The store of a launch, and the messages and bytes that it is sent and sends."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.messages: Counter[str] = Counter()
        self.nbytes = 0

    def set(self, key: str, value: str) -> None:
        self.multi_set([key], [value], operation="set")

    def multi_set(self, keys: Sequence[str], values: Sequence[str], *, operation: str = "multi_set") -> None:
        self.messages[operation] += 1
        self.values.update({key: value.encode() for key, value in zip(keys, values, strict=True)})
        self.nbytes += sum(map(len, keys)) + sum(map(len, values))

    def get(self, key: str) -> bytes:
        return self.multi_get([key], operation="get")[0]

    def multi_get(self, keys: Sequence[str], *, operation: str = "multi_get") -> list[bytes]:
        self.messages[operation] += 1
        values = [self.values[key] for key in keys]
        self.nbytes += sum(map(len, keys)) + sum(map(len, values))
        return values

    def check(self, keys: Sequence[str]) -> bool:
        self.messages["check"] += 1
        self.nbytes += sum(map(len, keys))
        return all(key in self.values for key in keys)


class _Node(Relay):
    """A local rank 0's end of its node, without a socket: the heartbeats that its ranks have sent."""

    def __init__(self, heartbeats: dict[int, str]) -> None:
        self.heartbeats = heartbeats

    def take(self) -> dict[int, str]:
        return dict(self.heartbeats)

    def store_replied(self, decision: str | None) -> None:
        self.decision = decision


def _watchdogs(world: int, store: Any) -> list[Watchdog]:
    """Those that have a connection to the store: of each node's local rank 0, which in a real run is a process."""
    collectives = {"student:0": 123_456, "student:1": 123_456, "student:2": 123_456}
    dogs = []
    for first in range(0, world, LOCAL_WORLD):
        others = {
            rank: Heartbeat(f"node-{first:05d}", 1, phase="train", collectives=collectives).dumps()
            for rank in range(first + 1, first + LOCAL_WORLD)
        }
        dogs.append(Watchdog(store, rank=first, world=world, relay=_Node(others)))
        dogs[-1]._connection = store
        dogs[-1].collectives = lambda: collectives
    return dogs


def _round(dogs: list[Watchdog], store: CountingStore, detector: HangDetector, tick: int) -> None:
    """Each node publishes, and rank 0 reads and decides."""
    store.messages.clear()
    store.nbytes = 0
    dogs[0]._decide(detector, tick)
    for dog in dogs[1:]:
        dog._poll(tick)


@pytest.mark.parametrize("world", [16, 512, WORLD])
def test_a_round_of_the_watchdog_is_two_messages_a_node(world: int) -> None:
    store, detector = CountingStore(), HangDetector(silence=60.0, period=1.0)
    dogs, nodes = _watchdogs(world, store), world // LOCAL_WORLD
    for tick in (1, 2, 3):  # the first one is before all have published
        _round(dogs, store, detector, tick)
    assert store.messages == {"multi_set": nodes, "get": nodes - 1, "multi_get": 1, "set": 1}
    # A heartbeat is written once and read once; a node reads the decision, which is short.
    assert store.nbytes < 1024 * world
    assert dogs[0]._abort is None
    assert set(store.values) == {"status", *map(str, range(1, world))}


def test_rank_0_reads_4096_heartbeats_in_one_message() -> None:
    assert Watchdog(world=WORLD)._period == 9.0, "a second for each 512 ranks, and one more"
    store, detector = CountingStore(), HangDetector(silence=60.0, period=9.0)
    dogs = _watchdogs(WORLD, store)
    for tick in (1, 2, 3):
        _round(dogs, store, detector, tick)
    read = dogs[0]._read_heartbeats()
    assert sorted(read) == list(range(1, WORLD))
    assert {heartbeat.phase for rank, heartbeat in read.items() if rank % LOCAL_WORLD} == {"train"}
