"""How the ranks of a launch find each other: one store, at MASTER_ADDR:MASTER_PORT, and a start that they agree on.

Anyone who can reach the port can read and write torch's store. Rank 0 therefore listens at one interface alone where
MASTER_ADDR is its address, and all keys of a run lie below a number that rank 0 draws at each start: what an earlier
start has left there, or another launch that was given the same port, is not read. What a value says is checked, and
made printable.
"""

import errno
import ipaddress
import json
import logging
import os
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.distributed.launch import Launch, raise_open_files
from megadistill.errors import OperatorFault, RankUserError, RestartFault, UserError
from megadistill.redaction import printable
from megadistill.units import number_of

logger = logging.getLogger(__name__)

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

NAME_SECONDS = 60.0
"""Time limit (s) for the name of MASTER_ADDR to be known: a scheduler may start a node before it can be looked up."""
PORT_SECONDS = 10.0
"""Time limit (s) for MASTER_PORT to be free on rank 0: an attempt that has just ended may hold it for a moment."""
QUIET_SECONDS = 5.0
"""Time (s) of waiting after which the log says so."""
MAX_VALUE = 4096
"""Bytes of the longest value that a rank writes here."""

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ADDRESS = "check MASTER_ADDR (torchrun and deepspeed: --master_addr), the name or address of rank 0's node"
_PORT = "MASTER_PORT (torchrun and deepspeed: --master_port)"


def launch_store(launch: Launch, timeout: timedelta) -> Store:
    """The store of this start of this launch, on every rank.

    Raises:
        UserError: the address cannot be right, or the ranks disagree on their number, or on their ranks.
        RestartFault: a rank did not come in time, or the port is taken.
        OperatorFault: this process has no file descriptor left.
    """
    raise_open_files()
    deadline = time.monotonic() + timeout.total_seconds()
    host, port = _address()
    where = f"rendezvous at {host}:{port} failed"
    try:
        store = _connect(launch, host, port, timeout, deadline, where)
        store.set_timeout(timeout)
        if launch.world == 1:
            return store
        launched = PrefixStore(f"launch-{os.environ.get('TORCHELASTIC_RUN_ID', '')}", store)
        number = _drawn_start(launched, launch, deadline, where) if launch.rank == 0 else None
        return PrefixStore(number or _received_start(launched, launch, deadline, where), store)
    except (DistError, OSError) as error:
        raise _fault(where, error) from error


def has_agent_store() -> bool:
    """Whether torchrun's agent has the store of the launch; else rank 0 has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _address() -> tuple[str, int]:
    host, text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not host.strip():
        raise UserError(f"MASTER_ADDR is empty: {_ADDRESS}")
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise UserError(f"{_PORT} is {printable(text)[:40]}: give a port, from 1 to 65535")
    return printable(host)[:255], int(text)


def _connect(launch: Launch, host: str, port: int, timeout: timedelta, deadline: float, where: str) -> Store:
    """The launch's store, which is on rank 0 or, under torchrun, in its first agent."""
    require_address(host, port, deadline, f"{where}: {host}", _ADDRESS)
    if launch.rank == 0 and not has_agent_store():
        listening = _listening(host, port, deadline, where)
        port = listening.getsockname()[1]
        return TCPStore(host, port, launch.world, True, timeout, False, True, listening.detach())
    absent = f"rank 0 has not started, or a firewall is in between; {_ADDRESS}"
    await_answer(host, port, deadline, where, absent)
    return TCPStore(host, port, launch.world, False, timeout, False)


def require_address(host: str, port: int, deadline: float, what: str, advice: str) -> None:
    """Waits until the name of the host can be looked up.

    Raises:
        UserError: it cannot be, in `NAME_SECONDS` or before the `deadline`: `what` it is, and advice.
    """
    end = min(deadline, time.monotonic() + NAME_SECONDS)
    while True:
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end or isinstance(error, UnicodeError):
                raise UserError(f"{what} has no address ({_reason(error)}): {advice}") from None
        time.sleep(0.5)


def _listening(host: str, port: int, deadline: float, where: str) -> socket.socket:
    """A socket on the port: of one interface where MASTER_ADDR is its address, of all where it is a name.

    A host may look up its own name as another address than the others do, most often as one of the loopback.
    """
    own = None
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        own = _bound(socket.AF_INET if address.version == 4 else socket.AF_INET6, (str(address), port), deadline, where)
    except ValueError:  # a name
        pass
    if own is None and socket.has_dualstack_ipv6():
        own = _bound(socket.AF_INET6, ("::", port), deadline, where)
    own = own or _bound(socket.AF_INET, ("0.0.0.0", port), deadline, where)
    if own is None:
        raise RestartFault(f"{where}: this host has no interface to listen at")
    return own


def _bound(family: socket.AddressFamily, address: tuple[str, int], deadline: float, where: str) -> socket.socket | None:
    """A listening socket; None where the address is not one of this host's."""
    end = min(deadline, time.monotonic() + PORT_SECONDS)
    while True:
        try:
            return socket.create_server(address, family=family, backlog=4096, dualstack_ipv6=address[0] == "::")
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # such as the address of a service
                return None
            if error.errno == errno.EACCES:
                raise UserError(f"{where}: only root may listen at port {address[1]}: give another {_PORT}") from None
            if error.errno != errno.EADDRINUSE:
                raise
            if time.monotonic() >= end:
                raise RestartFault(
                    f"{where}: another process of {socket.gethostname()} listens at port {address[1]} (`ss -ltnp` "
                    f"shows it): end it, or give another {_PORT}"
                ) from None
        time.sleep(0.2)


def await_answer(host: str, port: int, deadline: float, where: str, absent: str) -> None:
    """Waits until something listens at the address: torch's own attempts print the frames of their C++ code.

    Raises:
        RestartFault: nothing does before the `deadline`; `absent` says why that may be, and what to do.
        OSError: this process has no file descriptor left.
    """
    begin, is_logged = time.monotonic(), False
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))):
                return
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            if time.monotonic() >= deadline:
                seconds = time.monotonic() - begin
                raise RestartFault(
                    f"{where}: nothing answers there after {seconds:.0f} s ({_reason(error)}): {absent}"
                ) from None
            if not is_logged and time.monotonic() - begin > QUIET_SECONDS:
                logger.info("waiting for an answer at %s:%d (%s)", host, port, _reason(error))
                is_logged = True
        time.sleep(0.1)


def _drawn_start(store: Store, launch: Launch, deadline: float, where: str) -> str:
    """Rank 0: the number of this start, once every rank has it."""
    number, begin = secrets.token_hex(16), time.monotonic()
    heard: dict[int, bytes] = {}
    missing = set(range(1, launch.world))
    while missing:
        for rank in sorted(missing):
            if store.check([f"met-{number}-{rank}"]):
                missing.remove(rank)
            elif store.check([f"rank-{rank}"]) and (value := store.get(f"rank-{rank}")) != heard.get(rank):
                heard[rank] = value
                _answer(store, launch, rank, value, number, where)
        if missing and time.monotonic() >= deadline:
            some = ", ".join(map(str, sorted(missing)[:8]))
            more = "" if len(missing) <= 8 else f" and {len(missing) - 8} more"
            joined, seconds = launch.world - len(missing), time.monotonic() - begin
            raise RestartFault(
                f"{where}: {joined} of {number_of(launch.world, 'rank')} joined within {seconds:.0f} s; no word from "
                f"{some}{more}: see their logs, and check that WORLD_SIZE is {launch.world} and each rank "
                "is started once"
            )
        time.sleep(min(0.02 + len(missing) / 2000, time.monotonic() - begin + 0.001) if missing else 0.0)
    store.set(f"all-{number}", "")
    return number


def _answer(store: Store, launch: Launch, rank: int, value: bytes, number: str, where: str) -> None:
    """Sends a rank the number of the start, if it has the same world; a rank of an earlier start is gone."""
    content = _read(value)
    world, nonce = content.get("world"), content.get("nonce")
    if not isinstance(world, int) or not isinstance(nonce, str):
        return
    problem = ""
    if world != launch.world:
        host = printable(str(content.get("host")))[:64]
        sizes = f"WORLD_SIZE is {launch.world} on rank 0 and {world} on rank {rank} ({host})"
        problem = f"{where}: {sizes}: start all ranks alike"
    store.set(f"answer-{nonce[:64]}", json.dumps({"number": number, "problem": problem}))
    if problem:
        raise RankUserError(problem)


def _received_start(store: Store, launch: Launch, deadline: float, where: str) -> str:
    """Another rank: the number of this start, once every rank has it."""
    nonce, begin, key = secrets.token_hex(16), time.monotonic(), f"rank-{launch.rank}"
    store.set(key, json.dumps({"world": launch.world, "nonce": nonce, "host": socket.gethostname()}))
    number = None
    while time.monotonic() < deadline:
        if number is None and store.check([f"answer-{nonce}"]):
            answer = _read(store.get(f"answer-{nonce}"))
            if problem := answer.get("problem"):
                raise UserError(printable(str(problem))[:500])
            number = printable(str(answer.get("number")))[:64]
            store.set(f"met-{number}-{launch.rank}", "")
        if number is not None and store.check([f"all-{number}"]):
            return number
        other = _read(store.get(key))
        if other.get("nonce") != nonce:
            host = printable(str(other.get("host")))[:64]
            raise RankUserError(
                f"{where}: another process, on {host}, was started as rank {launch.rank} too: give each its own RANK "
                "(torchrun and deepspeed: each node its own --node_rank), and each launch a port of its own"
            )
        time.sleep(min(0.1, time.monotonic() - begin + 0.001))
    late = "rank 0 gave no answer" if number is None else "not all ranks came"
    raise RestartFault(f"{where}: {late} within {time.monotonic() - begin:.0f} s: see the log of rank 0")


def store_barrier(store: Store, name: str, rank: int, world: int, timeout: timedelta) -> float:
    """Waits until every rank of the launch is here; this node's monotonic clock (s) when they all were.

    Nothing is made on a device, and no rank polls: it sends three messages, and the store wakes those that wait. The
    store may be on rank 0, which leaves last. A name is used once.

    Raises:
        DistError: a rank did not come in time.
    """
    if world == 1:
        return time.monotonic()
    if store.add(f"{name}-here", 1) == world:
        store.set(f"{name}-all", "")
    else:
        store.wait([f"{name}-all"], timeout)
    together = time.monotonic()
    if store.add(f"{name}-left", 1) == world:
        store.set(f"{name}-end", "")
    elif rank == 0:
        store.wait([f"{name}-end"], timeout)
    return together


def _read(value: bytes) -> dict[str, Any]:
    """The fields that a rank has written; none where another program did."""
    try:
        content = json.loads(value) if len(value) <= MAX_VALUE else None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _fault(where: str, error: BaseException) -> Exception:
    if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error):
        return OperatorFault(f"{where}: {too_many_files()}")
    return RestartFault(
        f"{where}: {_reason(error)}: see the log of rank 0, and check that no other program has {_PORT}"
    )


def cannot_connect(error: BaseException) -> str | None:
    """Why this rank, which found the others, cannot connect to any of them; None: it is another fault.

    gloo and nccl listen at an interface of each node, which environment variables name.
    """
    text = str(error)
    if "Too many open files" in text:
        return too_many_files()
    if "Unable to find address for" in text or "no socket interface found" in text.lower():
        given = {name: os.environ[name] for name in _INTERFACES if name in os.environ}
        names = ", ".join(f"{name}={printable(value)[:40]}" for name, value in given.items()) or "none is set"
        have = ", ".join(name for _, name in socket.if_nameindex())
        return f"this host has no interface as the environment names it ({names}): it has {have}"
    return None


def too_many_files() -> str:
    return "this process may not open more files or connections: raise the limit (`ulimit -n 65536`) before the start"


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return printable(getattr(error, "strerror", None) or (lines[0] if lines else type(error).__name__))[:300]
