"""Whether the process at the other end is there: a connection that its system closes when it ends, however it does.

A host without power closes nothing; that is for heartbeats to find.
"""

import socket
import threading
from contextlib import suppress

CONNECT_SECONDS = 2.0
BACKLOG = 1024


class Presence:
    """This process's end of a connection to each of some others, and theirs to it. Nothing is ever sent.

    `towards`: host and port of a service that all of them reach, which tells the interface to listen at.
    """

    def __init__(self, towards: tuple[str, int]) -> None:
        with socket.create_connection(towards, timeout=CONNECT_SECONDS) as route:
            own = route.getsockname()[0]
        self._listening = socket.create_server((own, 0), family=_family(own), backlog=BACKLOG)
        self.address = f"{own}|{self._listening.getsockname()[1]}"
        """Address for the others' connections."""
        self._accepted: list[socket.socket] = []
        self._connections: dict[str, socket.socket | None] = {}
        """Address -> connection; None: it could not be reached, so that nothing is known of its end."""
        threading.Thread(target=self._accept, name="members presence", daemon=True).start()

    def has_left(self, address: str) -> bool:
        """Whether the process that listened at this address has ended, as far as its connection tells."""
        try:
            if address not in self._connections:
                self._connections[address] = _connected(address)
            connection = self._connections[address]
            if connection is None:
                return False
            return connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Ends the connections: the others see this process as ended."""
        for each in (self._listening, *self._accepted, *filter(None, self._connections.values())):
            with suppress(OSError):
                each.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self._accepted.append(self._listening.accept()[0])


def _connected(address: str) -> socket.socket | None:
    host, _, port = address.rpartition("|")
    try:
        connection = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
    except ConnectionRefusedError:  # its host is there, and it is not
        raise
    except (OSError, ValueError):
        return None
    connection.setblocking(False)
    return connection


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
