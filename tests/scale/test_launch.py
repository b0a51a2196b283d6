"""Starting 4,096 ranks: process groups, the watchdog's messages, exit codes of the ranks and checks of the nodes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megadistill.distributed.topology import Topology
from megadistill.distributed.watchdog.diagnosis import HangDetector, Heartbeat
from megadistill.distributed.watchdog.relay import Relay
from megadistill.distributed.watchdog.watchdog import Watchdog
from tests.scale.fake_world import LOCAL_WORLD, in_fake_world
from tests.slurm_double import shell, usable_nodes

WORLD = 4096


def _groups(topology: Topology) -> dict[str, list[int]]:
    """The ranks of each group that this rank is in."""
    groups = {
        "world": topology.shard_group,
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


@pytest.mark.parametrize("count", [2, 512])
def test_nodes_are_checked_by_one_step(tmp_path: Path, count: int) -> None:
    answers = {f"node-{number:05d}": "usable" for number in range(count + 4)}
    answers["node-00001"] = "unusable: ✗ memory: an uncorrected error"
    nodes, log, steps = usable_nodes(tmp_path, answers, count)
    assert nodes == [name for name in answers if name != "node-00001"][:count]
    assert steps == 1
    assert "node-00001 is not used: ✗ memory: an uncorrected error" in log


READERS = ("awk", "cat", "grep", "sed", "sort", "tail", "uniq")
"""Commands by which slurm/lib.sh may read the files of ranks."""


def _exit_codes(folder: Path, world: int) -> tuple[list[str], int]:
    """The lines of the job's log on the ends of `world` ranks, and the number of commands started for them."""
    logs = folder / f"logs-{world}"
    logs.mkdir()
    for first in range(0, world, LOCAL_WORLD):
        ranks = range(first, first + LOCAL_WORLD)
        codes = {rank: 4 if rank in (world - 1, world - 3) else 143 for rank in ranks}
        (logs / f"node-{first:05d}.codes").write_text("".join(f"{rank} {codes[rank]}\n" for rank in reversed(ranks)))
        (logs / f"node-{first:05d}.err").write_text("".join(f"{rank}: reason of {rank}\n" for rank in ranks))
    calls = folder / f"calls-{world}"
    counted = "".join(f'{name}() {{ echo {name} >>"$CALLS"; command {name} "$@"; }}\n' for name in READERS)
    script = f". slurm/lib.sh; STEP=(-); srun() {{ return 1; }}\n{counted}run_step; first_rank_with 2 4; exit_code_of 0"
    output = shell(script, logs, CALLS=str(calls)).stdout
    return output.splitlines(), len(calls.read_text().splitlines())


def test_exit_codes_of_4096_ranks_are_read_in_one_pass(tmp_path: Path) -> None:
    started = set()
    for world in (16, 512, WORLD):
        lines, commands = _exit_codes(tmp_path, world)
        assert lines[0].endswith(f"ranks by exit code: {world - 2} x 143, 2 x 4")
        assert lines[1:] == [f"{world - 3} exit code 4: reason of {world - 3}", "143"]
        started.add(commands)
    assert len(started) == 1, "the number of commands does not depend on that of ranks"


def test_the_rank_with_a_reason_of_its_own_is_named(tmp_path: Path) -> None:
    """The others of thousands print warnings at most, or that they lost another rank."""
    for node in range(4):
        ranks = range(node * LOCAL_WORLD, (node + 1) * LOCAL_WORLD)
        (tmp_path / f"node-{node}.codes").write_text("".join(f"{rank} 3\n" for rank in ranks))
        lost = f"{ranks[1]}: ERROR lost another rank in a collective: rank {LOCAL_WORLD + 4} (n1): a bit is wrong\n"
        own = f"{ranks[4]}: a line before\n{ranks[4]}: ERROR a bit is wrong\n" if node == 1 else ""
        warnings = "".join(f"{rank}: [W1129 15:00:00] Warning: a warning\n" for rank in ranks)
        (tmp_path / f"node-{node}.err").write_text(warnings + lost + own)
    script = ". slurm/lib.sh; first_rank_with 3; rm $LOGS/node-1.err; first_rank_with 3"
    named = f"{LOCAL_WORLD + 4} exit code 3: ERROR a bit is wrong"
    other = f"1 exit code 3: ERROR lost another rank in a collective: rank {LOCAL_WORLD + 4} (n1): a bit is wrong"
    assert shell(script, tmp_path).stdout.splitlines() == [named, other]
