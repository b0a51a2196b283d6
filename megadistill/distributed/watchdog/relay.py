"""The heartbeats of a node's ranks on their way to the store: one connection a node, which its local rank 0 holds.

The others of the node send theirs to it over a Unix socket. Where it does not answer (it has ended, it is frozen, its
rank is not where it is looked for) they connect to the store by themselves: its death is then reported as any other.
"""

import json
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from megadistill.distributed.watchdog.diagnosis import MAX_TEXT, Heartbeat

CONNECT_SECONDS = 10.0
"""Time limit for the local rank 0 to listen, from a rank's first heartbeat."""
REPLY_SECONDS = 5.0
"""Time limit for a reply of the local rank 0, which answers at once: its interpreter may be held for a moment."""

_MESSAGE = MAX_TEXT + 4096


class Reply(TypedDict):
    """The state of the store as the local rank 0 knows it."""

    decision: str | None
    """Rank 0's last decision; None before the first one."""
    age: float
    """Time (s) since the store's last reply."""
    error: str | None
    """Reason why the store cannot be reached."""


_REPLY = TypeAdapter(Reply)


class RelayLost(Exception):
    """The local rank 0 does not answer."""


class Relay:
    """The end of the local rank 0: collects the heartbeats of the node's other ranks, and answers each.

    `name`: of the socket. `ranks`: ranks of the launch whose heartbeats it takes. They may connect from now on; they
    are answered after `start`.

    Raises:
        OSError: the system has no socket of this kind.
    """

    def __init__(self, name: str, ranks: range) -> None:
        self._ranks = ranks
        self._heartbeats: dict[int, str] = {}
        self._decision: str | None = None
        self._error: str | None = None
        self._replied = time.monotonic()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listening.bind(f"\0{name}")  # an abstract name: it leaves no file
            self._listening.listen(len(ranks))
        except OSError:
            self._listening.close()
            raise
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="watchdog relay", daemon=True)
        self._publish_now: Callable[[], None] = lambda: None

    def start(self, publish_now: Callable[[], None]) -> None:
        """`publish_now`: called when a rank ends, which may not wait for the next regular message to the store."""
        self._publish_now = publish_now
        self._thread.start()

    def take(self) -> dict[int, str]:
        """The last heartbeat of each rank that has sent one since the last call."""
        # One at a time: the thread may be about to put one into the dictionary.
        return {rank: self._heartbeats.pop(rank) for rank in list(self._heartbeats)}

    def store_replied(self, decision: str | None) -> None:
        """The store works; `decision` is rank 0's last one."""
        self._decision, self._error, self._replied = decision, None, time.monotonic()

    def store_failed(self, error: str) -> None:
        self._error = error

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # all of them are sockets
        self._selector.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listening:
                    self._accept()
                elif not self._answer(connection):
                    self._selector.unregister(connection)
                    connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listening.accept()
            if _peer_user(connection) == os.getuid():
                connection.setblocking(False)  # a full buffer of one rank holds up no other
                self._selector.register(connection, selectors.EVENT_READ)
            else:
                connection.close()

    def _answer(self, connection: socket.socket) -> bool:
        """Takes a heartbeat and replies; False: the rank is gone."""
        try:
            message = connection.recv(_MESSAGE)
            rank, _, heartbeat = message.decode("utf-8").partition(" ")
            if not message or int(rank) not in self._ranks:
                return False
            self._heartbeats[int(rank)] = heartbeat
            state = Heartbeat.loads(heartbeat)
            if state is not None and state.end is not None:
                self._publish_now()
            age = time.monotonic() - self._replied
            reply: Reply = {"decision": self._decision, "age": age, "error": self._error}
            connection.send(json.dumps(reply).encode())
        except (OSError, ValueError):
            return False
        return True


class RelayClient:
    """The end of another rank of the node."""

    def __init__(self, name: str, rank: int) -> None:
        self._name, self._rank = name, rank
        self._connection: socket.socket | None = None
        self._connect_until: float | None = None

    def exchange(self, heartbeat: str, *, waits: bool) -> Reply | None:
        """Sends a heartbeat; None: the local rank 0 does not listen yet, and `waits` allows that.

        Raises:
            RelayLost: it does not answer.
        """
        now = time.monotonic()
        if self._connect_until is None:
            self._connect_until = now + CONNECT_SECONDS
        try:
            if self._connection is None:
                self._connection = _connected(self._name)
            self._connection.send(f"{self._rank} {heartbeat}".encode())
            message = self._connection.recv(_MESSAGE)
            return _REPLY.validate_json(message)
        except (OSError, ValueError) as error:
            if self._connection is None and waits and now < self._connect_until:
                return None
            self.close()
            raise RelayLost(str(error)) from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _connected(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(REPLY_SECONDS)
        connection.connect(f"\0{name}")
        if _peer_user(connection) != os.getuid():
            raise OSError("another user listens there")
    except OSError:
        connection.close()
        raise
    return connection


def _peer_user(connection: socket.socket) -> int:
    """The user id of the process at the other end."""
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return int(user)
