"""The ranks of a launch find each other, or a user reads why they do not."""

import json
import os
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from megadistill.distributed import rendezvous
from megadistill.distributed.launch import Launch
from megadistill.distributed.rendezvous import cannot_connect, launch_store
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError

SHORT = timedelta(seconds=1.5)
LONG = timedelta(seconds=60)


def _launch(rank: int, world: int = 2) -> Launch:
    return Launch(rank=rank, world=world, local_rank=rank, local_world=world)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = int(server.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free))
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rendezvous, "PORT_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "NAME_SECONDS", 0.3)
    return free


@pytest.fixture
def agent(port: int, monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of torchrun's agent, which outlives the restarts of its ranks."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return TCPStore("127.0.0.1", port, None, True, LONG, False)


def test_ranks_meet_and_each_start_has_keys_of_its_own(agent: TCPStore) -> None:
    """torchrun keeps one store over restarts: an address in it may be that of a killed rank, of any of its nodes."""
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            first, second = pool.map(lambda rank: launch_store(_launch(rank), LONG), range(2))
            assert not first.check(["address"])
            second.set("address", "of this start")
            assert first.get("address") == b"of this start"


def test_a_key_that_a_killed_start_left_is_not_mistaken_for_a_rank(agent: TCPStore) -> None:
    left = json.dumps({"world": 2, "nonce": "of a killed rank", "host": "n1"})
    agent.set("launch-/rank-1", left)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(launch_store, _launch(0), LONG)
        while not agent.check(["launch-/answer-of a killed rank"]):
            assert not first.done()
        second = launch_store(_launch(1), LONG)
        second.set("key", "value")
        assert first.result().get("key") == b"value"


def test_the_store_listens_at_the_interface_of_the_address(port: int) -> None:
    store = launch_store(_launch(0, world=1), LONG)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert store is not None


def test_a_taken_port(port: int) -> None:
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(RestartFault, match=rf"^rendezvous at 127.0.0.1:{port} failed: another .* listens"),
    ):
        launch_store(_launch(0), SHORT)


def test_an_unknown_master(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(UserError, match=r"at no-such-host.invalid:\d+ failed: .* has no address .*MASTER_ADDR"):
        launch_store(_launch(1), SHORT)


def test_a_master_that_refuses(port: int) -> None:
    with pytest.raises(RestartFault, match=r"nothing answers there after \d s \(Connection refused\): rank 0 has not"):
        launch_store(_launch(1), SHORT)


@pytest.mark.parametrize("text", ["many", "-1", "65536", "", "\x1b[2J"])
def test_a_port_that_is_none(port: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", text)
    with pytest.raises(UserError, match=r"MASTER_PORT .* give a port") as caught:
        launch_store(_launch(1), SHORT)
    assert str(caught.value).isprintable()


def test_a_rank_that_does_not_come(port: int) -> None:
    with pytest.raises(RestartFault, match=r"1 of 3 ranks joined within . s; no word from 1, 2"):
        launch_store(_launch(0, world=3), SHORT)


def test_two_processes_with_one_rank(agent: TCPStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(launch_store, _launch(1, world=3), SHORT) for _ in range(2)]
        errors = [each.exception() for each in both]
    assert any(isinstance(error, RankUserError) and "started as rank 1 too" in str(error) for error in errors)


def test_ranks_with_two_numbers_of_ranks(agent: TCPStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        errors = [pool.submit(launch_store, _launch(rank, world), LONG) for rank, world in ((0, 3), (1, 2))]
        for each in errors:
            error = each.exception()
            assert isinstance(error, UserError)
            assert "WORLD_SIZE is 3 on rank 0 and 2 on rank 1" in str(error)


@pytest.mark.parametrize("value", [b"\x80\x04.", b"[" * 5000, b"{}", b'{"world": "2", "nonce": 1}', b"\x1b[2J"])
def test_what_a_stranger_wrote_is_neither_read_nor_printed(agent: TCPStore, value: bytes) -> None:
    agent.set("launch-/rank-1", value.decode("latin-1"))
    with pytest.raises(RestartFault, match=r"1 of 2 ranks joined") as caught:
        launch_store(_launch(0), SHORT)
    assert str(caught.value).isprintable()


def test_no_file_descriptor_left(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "raise_open_files", lambda: None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as next_one:
        lowest = next_one.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(OperatorFault, match=r"may not open more files or connections: .*`ulimit -n 65536`"):
            launch_store(_launch(0), SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_interface_that_this_host_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    error = RuntimeError("[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: eth99")
    assert "GLOO_SOCKET_IFNAME=eth99" in (cannot_connect(error) or "")
    assert cannot_connect(RuntimeError("Connection closed by peer")) is None
