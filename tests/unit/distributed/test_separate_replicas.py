"""Replicas that are launches of their own: their place in the environment, the end of a process, waits that end."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from megadistill.distributed import members
from megadistill.distributed.groups.guard import Guard
from megadistill.distributed.groups.presence import Presence
from megadistill.distributed.launch import Launch, SeparateReplica, replica_launch
from megadistill.distributed.topology import Topology
from megadistill.errors import RestartFault, UserError
from tests.paths import ROOT

ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), timeout=timedelta(minutes=10))
PLACE = {"MEGADISTILL_REPLICA": "1", "MEGADISTILL_REPLICAS": "3", "MEGADISTILL_STORE": "node7:29400"}


def _environment(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in {**PLACE, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_the_place_of_a_replica_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    _environment(monkeypatch, MEGADISTILL_STORE="[::1]:29400")
    assert SeparateReplica.from_environment() == SeparateReplica(1, 3, "::1", 29400)
    for name in PLACE:
        monkeypatch.delenv(name)
    assert SeparateReplica.from_environment() is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"MEGADISTILL_STORE": None}, "but not MEGADISTILL_STORE"),
        ({"MEGADISTILL_REPLICA": "3"}, "replicas count from 0 to one less than their number"),
        ({"MEGADISTILL_REPLICA": "-1"}, "replicas count from 0"),
        ({"MEGADISTILL_REPLICA": ""}, "MEGADISTILL_REPLICA is empty"),
        ({"MEGADISTILL_REPLICAS": "many"}, "MEGADISTILL_REPLICAS many"),
        ({"MEGADISTILL_STORE": "node7"}, "give HOST:PORT"),
        ({"MEGADISTILL_STORE": "node7:70000"}, "give HOST:PORT"),
    ],
)
def test_a_wrong_place_is_refused(changes: dict[str, str | None], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _environment(monkeypatch, **changes)
    with pytest.raises(UserError, match=line) as refused:
        Launch.from_environment()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "fault", "line"),
    [
        ("127.0.0.1", RestartFault, "nothing answers there after 1 s .*: start python -m"),
        ("nowhere.invalid", UserError, "has no address .*: give HOST:PORT"),
    ],
)
def test_a_store_that_does_not_answer_is_one_line(
    host: str, fault: type[Exception], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        separate = SeparateReplica(0, 2, host, taken.getsockname()[1])
        with pytest.raises(fault, match=f"^MEGADISTILL_STORE={separate.store}, the store of the replicas:? {line}"):
            members._connect(separate, timedelta(seconds=1))
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", ""), "torch printed the frames of its C++ code"


@pytest.fixture(params=["127.0.0.1", "::1"])
def separate(request: pytest.FixtureRequest) -> Iterator[SeparateReplica]:
    """The first of two replicas, and a store at an address."""
    command = [sys.executable, "-m", "megadistill.distributed.store_server", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as store:
        assert store.stdout is not None
        yield SeparateReplica(0, 2, request.param, int(store.stdout.readline().split()[-1]))
        store.kill()


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_replica_that_waits_for_the_others_ends_when_it_is_asked_to_stop(
    separate: SeparateReplica, has_begun: bool
) -> None:
    """It waits for the first step, or to join a run that has begun."""
    if has_begun:
        _begin(separate, ranks=1)
    waiting = members.Members(separate, ALONE, minimum=1)
    assert waiting.joins == has_begun
    looks = iter([False, False, True])
    waiting.is_stopped = partial(next, looks)
    with pytest.raises(RestartFault, match="stopped while it waited for the other replicas"):
        waiting.next_epoch(-1)
    assert not list(looks), "all three looks were taken"
    waiting.close(ended=False)


def _begin(separate: SeparateReplica, ranks: int) -> None:
    """A run with replica 1 alone, of so many ranks."""
    others = {"number": 1, "members": [asdict(members.Member("1-a", 1, "node", "", ranks, 5))]}
    members._connect(separate, timedelta(seconds=20)).set("epoch/1", json.dumps(others))


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_replica_of_another_number_of_ranks_is_refused(separate: SeparateReplica, has_begun: bool) -> None:
    """It is one that joins, or one of the first two, which the other one has decided."""
    if has_begun:
        _begin(separate, ranks=2)
    waiting = members.Members(separate, ALONE, minimum=1)
    if not has_begun:
        own = members.Member(waiting._id, 0, "node", "", 1, -1)
        other = members.Member("1-a", 1, "node", "", 2, -1)
        record = {"number": 1, "members": [asdict(own), asdict(other)]}
        members._connect(separate, timedelta(seconds=20)).set("epoch/1", json.dumps(record))
    line = "replica 0 has 1 rank, replica 1 has 2: launch all replicas with equally many ranks"
    with pytest.raises(UserError, match=line):
        waiting.next_epoch(-1)
    assert not waiting._store.check([f"joins/{waiting._id}"]), "the run is not disturbed"
    waiting.close(ended=False)


def test_a_store_without_a_port_is_refused() -> None:
    command = [sys.executable, "-m", "megadistill.distributed.store_server", "--port", "70000"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("--port is 70000: give one from 1 to 65535, or 0")


def test_ranks_of_all_replicas_are_counted_by_replica() -> None:
    launch = Launch(1, 2, 1, 2, SeparateReplica(2, 3, "node7", 29400)).of_all_replicas()
    assert (launch.rank, launch.world) == (5, 6)
    replica = replica_launch(None, launch)
    assert (replica.rank, replica.world, replica.local_world) == (1, 2, 2)
    with pytest.raises(UserError, match=r"distributed\.shard is 3, and this replica is a launch of 2 ranks"):
        replica_launch(3, launch)


def test_replicas_of_a_launch_divide_its_ranks() -> None:
    assert replica_launch(4, Launch(6, 8, 6, 8)).rank == 2
    with pytest.raises(UserError, match=r"set distributed\.shard to one of 1, 2, 4, 8"):
        replica_launch(3, Launch(0, 8, 0, 8))


@pytest.fixture(name="service")
def a_service_that_both_reach() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[:2]


OTHER = """
import sys, time
from megadistill.distributed.groups.presence import Presence
presence = Presence(("127.0.0.1", int(sys.argv[1])))
print(presence.address, flush=True)
time.sleep(60)
"""


def test_the_end_of_a_process_is_seen_whatever_ends_it(service: tuple[str, int]) -> None:
    own = Presence(service)
    command = [sys.executable, "-c", OTHER, str(service[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        address = other.stdout.readline().strip()
        assert not own.has_left(address)
        assert not own.has_left(address), "nothing is read from a connection that is open"
        other.kill()
        other.wait()
    assert own.has_left(address)
    assert own.has_left(address), "once and for all"
    assert Presence(service).has_left(address), "who comes later learns it too: its host refuses"
    own.close()


def test_a_host_that_does_not_answer_may_be_alive(service: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    own = Presence(service)

    def silent(*_: Any, **__: Any) -> Any:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    assert not own.has_left("192.0.2.1|9")
    own.close()


class _Work:
    """A collective that ends when `done` is set."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def is_completed(self) -> bool:
        return self.done.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.done.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError("timed out")
        return True


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_wait_across_replicas_ends_with_its_epoch(on_cpu: bool) -> None:
    reasons: list[str] = []
    guard, work = Guard(reasons.append), _Work()
    start: Any = lambda: work  # noqa: E731
    threading.Timer(0.3, guard.broken.set).start()
    began = time.monotonic()
    assert not guard.finish(start, on_cpu=on_cpu)
    assert 0.2 < time.monotonic() - began < 30, "it waited, and ended without the collective"
    assert not reasons, "who told it knows"
    assert not guard.finish(start, on_cpu=on_cpu), "nothing begins in an epoch that has ended"


def test_a_collective_that_ends_well_or_fails() -> None:
    reasons: list[str] = []
    guard, work = Guard(reasons.append), _Work()
    start: Any = lambda: work  # noqa: E731
    threading.Timer(0.3, work.done.set).start()
    assert guard.finish(start, on_cpu=True)

    def fails() -> Any:
        raise RuntimeError("Connection reset by peer\nmore")

    assert not guard.finish(fails, on_cpu=True)
    assert reasons == ["Connection reset by peer"], "the other replicas are told"
