"""The node's connection to the store: one for all ranks of a node, and one of its own for a rank that finds none."""

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import _node_relay
from megadistill.distributed.watchdog import relay, watchdog
from megadistill.distributed.watchdog.diagnosis import Heartbeat
from megadistill.distributed.watchdog.relay import Relay, RelayClient, RelayLost
from megadistill.distributed.watchdog.watchdog import Watchdog

TIMEOUT = timedelta(seconds=20)


def _heartbeat(**values: Any) -> str:
    return Heartbeat("n1", 1, **values).dumps()


@contextmanager
def _relay(ranks: range = range(1, 3), publish_now: Callable[[], None] = lambda: None) -> Iterator[tuple[str, Relay]]:
    name = secrets.token_hex(8)
    made = Relay(name, ranks)
    made.start(publish_now)
    try:
        yield name, made
    finally:
        made.close()


def _connections(port: int) -> int:
    """Connections to the store, as its own process sees them."""
    lines = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return sum(int(line[1].rpartition(":")[2], 16) == port and line[3] == "01" for line in lines)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_watchdog_of_8_ranks_on_2_nodes_has_2_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)
    server = TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    with ExitStack() as stack:
        stores = [TCPStore("127.0.0.1", server.port, None, False, TIMEOUT) for _ in range(8)]
        before = _connections(server.port)
        dogs = []
        for rank, store in enumerate(stores):
            launch = Launch(rank, 8, rank % 4, 4)
            dogs.append(Watchdog(store, rank=rank, world=8, relay=_node_relay(launch, store)).start())
            stack.callback(dogs[-1].stop)
        _until(lambda: dogs[0]._all_present)
        _until(lambda: all(dog._last_reply is not None for dog in dogs))
        assert _connections(server.port) - before == 2
        assert [dog._connection is not None for dog in dogs] == [rank % 4 == 0 for rank in range(8)]


def test_heartbeats_are_collected_and_decisions_passed_on() -> None:
    with _relay() as (name, node):
        first, second = RelayClient(name, 1), RelayClient(name, 2)
        answer = first.exchange(_heartbeat(tick=1), waits=True)
        assert answer is not None
        assert (answer["decision"], answer["error"]) == (None, None)
        node.store_replied("a decision")
        answer = second.exchange(_heartbeat(tick=2), waits=True)
        assert answer is not None
        assert answer["decision"] == "a decision"
        assert 0 <= answer["age"] < 20
        assert node.take() == {1: _heartbeat(tick=1), 2: _heartbeat(tick=2)}
        assert node.take() == {}, "each is passed on once: its rank may have found another way since"
        node.store_failed("gone")
        answer = first.exchange(_heartbeat(tick=3), waits=True)
        assert answer is not None
        assert answer["error"] == "gone"
        first.close()
        second.close()


def test_the_end_of_a_rank_is_passed_on_at_once() -> None:
    called = threading.Event()
    with _relay(publish_now=called.set) as (name, _):
        client = RelayClient(name, 1)
        client.exchange(_heartbeat(tick=1), waits=True)
        assert not called.is_set()
        client.exchange(_heartbeat(tick=2, end="ValueError: x"), waits=True)
        assert called.wait(20)
        client.close()


@pytest.mark.parametrize("rank", [0, 3, -1])
def test_a_rank_of_another_node_is_sent_away(rank: int) -> None:
    with _relay() as (name, node):
        with pytest.raises(RelayLost):
            RelayClient(name, rank).exchange(_heartbeat(), waits=True)
        assert node.take() == {}


def test_a_rank_waits_for_the_first_of_its_node_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    client = RelayClient(secrets.token_hex(8), 1)
    assert client.exchange(_heartbeat(), waits=True) is None
    with pytest.raises(RelayLost):
        client.exchange(_heartbeat(), waits=False)
    monkeypatch.setattr(relay, "CONNECT_SECONDS", 0.0)
    with pytest.raises(RelayLost):
        RelayClient(secrets.token_hex(8), 1).exchange(_heartbeat(), waits=True)


def test_one_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a frozen one: the system accepts connections for it."""
    monkeypatch.setattr(relay, "REPLY_SECONDS", 0.05)
    name = secrets.token_hex(8)
    frozen = Relay(name, range(1, 2))
    with pytest.raises(RelayLost):
        RelayClient(name, 1).exchange(_heartbeat(), waits=True)
    frozen.close()


def test_a_store_that_ends_with_the_first_of_the_node_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would try to connect for the time limit of the store, and report nothing until then."""
    monkeypatch.setattr(relay, "CONNECT_SECONDS", 0.0)
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)
    server = TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    store = PrefixStore("start", TCPStore("127.0.0.1", server.port, None, False, timedelta(minutes=2)))
    del server
    dog = Watchdog(store, rank=1, world=2, relay=RelayClient(secrets.token_hex(8), 1)).start()
    try:
        _until(lambda: dog._lost_rank is not None)
        assert dog._lost_rank is not None
        assert dog._lost_rank.startswith("rank 0, or the launcher that holds the store")
    finally:
        dog.stop()


def test_a_system_without_such_sockets_costs_each_rank_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    store, launch = HashStore(), Launch(0, 2, 0, 2)
    made = _node_relay(launch, store)
    assert isinstance(made, Relay)
    made.close()
    monkeypatch.setattr(socket, "SOCK_SEQPACKET", socket.SOCK_RAW)  # which has no listeners
    assert _node_relay(launch, store) is None


def test_rank_0_has_a_connection_of_its_own_whatever_its_local_rank() -> None:
    """It reads and decides for all. A launcher may give it another local rank than 0."""
    assert _node_relay(Launch(0, 2, 1, 2), HashStore()) is None
