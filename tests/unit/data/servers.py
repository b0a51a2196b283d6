"""A real HTTP server on loopback that answers ranged requests, and misbehaves on demand."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Misdeed = Callable[["Handler", bytes], bool]
"""Called with a request and the bytes of a good response; returns True where it has sent a response itself."""


class Server(ThreadingHTTPServer):
    """Serves the files of `folder`. `requests` are paths and Range headers, `misdeeds` one a request, in turn."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str | None]] = []
        self.misdeeds: list[Misdeed | None] = []
        self.always: Misdeed | None = None
        self.released = threading.Event()
        """Set when the test is over: stalled answers end."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests want."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        header = self.headers.get("Range")
        self.server.requests.append((path, header))
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        start, stop = 0, len(data)
        if header:
            first, last = header.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, len(data))
        self.total, self.start = len(data), start
        misdeed = self.server.always or (self.server.misdeeds.pop(0) if self.server.misdeeds else None)
        if misdeed and misdeed(self, data[start:stop]):
            return
        if header and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.answer(data[start:stop], status=206 if header else 200)

    def answer(self, body: bytes, *, status: int, claimed: int | None = None) -> None:
        """`claimed`: the length that the headers say, where it is not the body's."""
        length = len(body) if claimed is None else claimed
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", f"bytes {self.start}-{self.start + length - 1}/{self.total}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def stalls(handler: Handler, body: bytes) -> bool:
    """Sends half of the body, and then nothing more."""
    handler.answer(body[: len(body) // 2], status=206, claimed=len(body))
    handler.wfile.flush()
    handler.server.released.wait(60)
    handler.close_connection = True
    return True


def truncates(handler: Handler, body: bytes) -> bool:
    """Hangs up in the middle of the body."""
    handler.answer(body[: len(body) // 2], status=206, claimed=len(body))
    handler.close_connection = True
    return True


def shortens(handler: Handler, body: bytes) -> bool:
    """A whole, valid answer with fewer bytes than were asked for."""
    handler.answer(body[: len(body) // 2], status=206)
    return True


def hangs_up(handler: Handler, body: bytes) -> bool:
    handler.close_connection = True
    return True


def ignores_ranges(handler: Handler, body: bytes) -> bool:
    handler.answer((handler.server.folder / handler.path.lstrip("/")).read_bytes(), status=200)
    return True


def fails(status: int) -> Misdeed:
    def misdeed(handler: Handler, body: bytes) -> bool:
        handler.send_error(status)
        return True

    return misdeed


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
