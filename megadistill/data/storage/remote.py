"""Files behind URLs, read in whole aligned blocks: ranged requests, again after an error. It knows no format.

One list of blocks, bounded in bytes, serves all files of a folder. What a server says is input: an answer that is
longer or shorter than what was asked for is an error, whatever its status.
"""

import asyncio
import errno
import random
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import fsspec
from fsspec.asyn import get_loop

from megadistill.data.storage.base import Bytes, outside, refuse_larger
from megadistill.errors import UserError
from megadistill.redaction import scrubbed, shown

_T = TypeVar("_T")

BLOCK_BYTES: Final = 1 << 20
CACHE_BYTES: Final = 512 << 20
REQUESTS: Final = 16
"""At the same time, for one folder."""

ABSENT_STATUS: Final = (404, 410)
PERMANENT: Final = (FileNotFoundError, PermissionError, IsADirectoryError)
PASSING_STATUS: Final = (408, 425, 429)
"""Of the 4xx, those that another attempt may not meet."""


@dataclass(frozen=True)
class Patience:
    """How long a block is waited for, and how often it is asked for; in seconds."""

    attempts: int = 6
    limit: float = 30.0
    """Of one attempt."""
    pause: float = 0.5
    """Before the second attempt, about; twice as long before each further one."""
    longest_pause: float = 20.0

    def pause_before(self, attempt: int) -> float:
        """Drawn from the upper half, so that the ranks of a cluster do not all come back at once."""
        return min(self.longest_pause, self.pause * 2.0 ** (attempt - 2)) * _draws.uniform(0.5, 1.0)


_draws = random.Random()  # its own: a retry must not move anybody's seeded stream


class _Refusal(Exception):
    """An attempt failed; `passing`: another one may not; `absent`: there is no such file."""

    def __init__(self, reason: str, *, passing: bool, absent: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing
        self.absent = absent


class _Server(Protocol):
    """One way of asking for bytes; runs on fsspec's loop. Raises whatever went wrong."""

    async def size(self, url: str) -> int: ...

    async def get(self, url: str, start: int, stop: int) -> bytes: ...


class RemoteFolder:
    """A folder behind a URL of any scheme that fsspec knows."""

    def __init__(self, location: str, *, cache_bytes: int = CACHE_BYTES, patience: Patience | None = None) -> None:
        """Reaches for nothing yet.

        Raises:
            UserError: the scheme is unknown, or its package is not installed.
        """
        self._url = location.rstrip("/")
        self.location = shown(self._url)
        self._patience = patience or Patience()
        self._cache_bytes = cache_bytes
        self._blocks = _Blocks(max(1, cache_bytes // BLOCK_BYTES))
        self._errors: dict[_Key, OSError] = {}
        self._server = _server(self._url)
        self._given_up = False

    def open(self, name: str) -> "RemoteFile":
        async def size() -> int:
            return await self._patiently(name, "its size", lambda url: self._server.size(url))

        return RemoteFile(self, name, _run(size()))

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        file = self.open(name)
        refuse_larger(f"{self.location}/{name}", file.size, max_bytes)
        return bytes(file.read(0, file.size))

    def sibling(self, path: str) -> "RemoteFolder":
        parent, _, _ = self._url.rpartition("/")
        url = f"{parent}/{path[3:]}" if path.startswith("../") else f"{self._url}/{path}"
        return RemoteFolder(url, cache_bytes=self._cache_bytes, patience=self._patience)

    def prefetch(self, ranges: Iterable[tuple[Bytes, int, int]]) -> None:
        wanted: dict[_Key, int] = {}
        for file, start, length in ranges:
            assert isinstance(file, RemoteFile)
            for number in _numbers(start, length):
                wanted[file.name, number] = file.size
        self._errors.clear()
        missing = [key for key in wanted if self._blocks.get(key) is None][: self._blocks.room]
        if not missing:
            return
        for key, block in zip(missing, _run(self._fetch_all(missing, wanted)), strict=True):
            if isinstance(block, OSError):
                self._errors[key] = block

    def block(self, name: str, number: int, size: int) -> memoryview:
        """Block `number` of a file of `size` bytes. Raises OSError; the one that `prefetch` met, where it did."""
        key = name, number
        block = self._blocks.get(key)
        if block is not None:
            return block
        if key in self._errors:
            raise self._errors[key]
        return _run(self._fetch(key, size))

    async def _fetch_all(self, keys: list["_Key"], sizes: dict["_Key", int]) -> list[memoryview | OSError]:
        turns = asyncio.Semaphore(REQUESTS)

        async def fetch(key: _Key) -> memoryview | OSError:
            async with turns:
                try:
                    return await self._fetch(key, sizes[key])
                except OSError as error:
                    return error

        return list(await asyncio.gather(*map(fetch, keys)))

    async def _fetch(self, key: "_Key", size: int) -> memoryview:
        name, number = key
        start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, size)

        async def get(url: str) -> bytes:
            data = await self._server.get(url, start, stop)
            if len(data) != stop - start:
                raise _Refusal(f"the answer has {len(data)} bytes, not {stop - start}", passing=True)
            return data

        block = memoryview(await self._patiently(name, f"bytes {start} to {stop}", get))
        self._blocks.put(key, block)
        return block

    async def _patiently(self, name: str, what: str, ask: Callable[[str], Awaitable[_T]]) -> _T:
        """What `ask` gives, after as many attempts as patience allows: one, while the last request was given up."""
        url, patience = f"{self._url}/{name}", self._patience
        attempts = 1 if self._given_up else patience.attempts
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                await asyncio.sleep(patience.pause_before(attempt))
            try:
                answer = await asyncio.wait_for(ask(url), patience.limit)
            except Exception as error:  # whatever a file system of fsspec raises
                refusal = _refusal(error, patience.limit)
                if not refusal.passing:
                    break
            else:
                self._given_up = False
                return answer
        self._given_up = refusal.passing
        tries = f"{attempt} attempt{'s' if attempt > 1 else ''}"
        number = errno.ENOENT if refusal.absent else errno.EIO  # OSError is FileNotFoundError by its number
        raise OSError(number, f"{what} could not be read in {tries}: {refusal}", shown(url))


class RemoteFile:
    """An open file of a RemoteFolder."""

    def __init__(self, folder: RemoteFolder, name: str, size: int) -> None:
        if size == 0:
            raise OSError(errno.EINVAL, "it is empty", f"{folder.location}/{name}")
        self._folder = folder
        self.name = name
        self.size = size

    def read(self, start: int, length: int) -> memoryview:
        if not 0 <= start <= start + length <= self.size:
            raise outside(f"{self._folder.location}/{self.name}", start, length, self.size)
        parts = []
        for number in _numbers(start, length):
            begin = number * BLOCK_BYTES
            block = self._folder.block(self.name, number, self.size)
            parts.append(block[max(0, start - begin) : start + length - begin])
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


_Key = tuple[str, int]
"""Of a block: the file's name, and the block's number in it."""


class _Blocks:
    """The blocks read last, `room` of them; for several threads."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._blocks: OrderedDict[_Key, memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _Key) -> memoryview | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: _Key, block: memoryview) -> None:
        with self._lock:
            self._blocks[key] = block
            if len(self._blocks) > self.room:
                self._blocks.popitem(last=False)


class _Http:
    """http:// and https://, through fsspec's session: its statuses and lengths are read before its bodies."""

    def __init__(self, files: Any) -> None:
        self._files = files

    async def size(self, url: str) -> int:
        async with self._asked(url, 0, 1) as answer:
            _, total = _content_range(answer)
            return total

    async def get(self, url: str, start: int, stop: int) -> bytes:
        async with self._asked(url, start, stop) as answer:
            (first, last), _ = _content_range(answer)
            if (first, last) != (start, stop - 1) or answer.content_length not in (None, stop - start):
                raise _Refusal(
                    f"the answer is bytes {first} to {last + 1}, {answer.content_length} bytes long", passing=True
                )
            data: bytes = await answer.content.readexactly(stop - start)
            return data

    @asynccontextmanager
    async def _asked(self, url: str, start: int, stop: int) -> AsyncIterator[Any]:
        session = await self._files.set_session()
        options = dict(self._files.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        async with session.get(self._files.encode_url(url), headers=headers, **options) as answer:
            if answer.status >= 400 and answer.status != 416:
                passing = answer.status >= 500 or answer.status in PASSING_STATUS
                absent = answer.status in ABSENT_STATUS
                raise _Refusal(f"{answer.status} {answer.reason}", passing=passing, absent=absent)
            if answer.status not in (206, 416):
                raise _Refusal(f"status {answer.status}: the server does not answer ranged requests", passing=False)
            yield answer


def _content_range(answer: Any) -> tuple[tuple[int, int], int]:
    """First and last byte, and bytes of the whole file: `bytes 0-99/1234`; `bytes */0` for an empty one."""
    said = answer.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", said)
    if not found:
        raise _Refusal(f"status {answer.status} with Content-Range {said[:60]!r}", passing=False)
    first, last, total = found.groups()
    return (int(first or 0), int(last or -1)), int(total)


class _Other:
    """Every other scheme, as its package of fsspec reads it."""

    def __init__(self, files: Any) -> None:
        self._files = files

    async def size(self, url: str) -> int:
        path = self._files._strip_protocol(url)
        # fsspec's own names for the coroutines of an asynchronous file system
        info = await (self._files._info(path) if self._files.async_impl else asyncio.to_thread(self._files.info, path))
        if not isinstance(info.get("size"), int):
            raise _Refusal("its size is not known", passing=False)
        size: int = info["size"]
        return size

    async def get(self, url: str, start: int, stop: int) -> bytes:
        path = self._files._strip_protocol(url)
        if self._files.async_impl:
            data: bytes = await self._files._cat_file(path, start=start, end=stop)
            return data
        return await asyncio.to_thread(self._files.cat_file, path, start=start, end=stop)


def _server(url: str) -> _Server:
    scheme = url.partition("://")[0]
    try:
        files, _ = fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{shown(url)} needs a package that is not installed ({scrubbed(str(error))}): "
            f"pip install 'megadistill[remote]', and the package of {scheme}://"
        ) from None
    except ValueError as error:
        raise UserError(f"{shown(url)} cannot be read: {scrubbed(str(error))}: give a path or another URL") from None
    return _Http(files) if scheme in ("http", "https") else _Other(files)


def _refusal(error: Exception, limit: float) -> _Refusal:
    if isinstance(error, _Refusal):
        return error
    if isinstance(error, TimeoutError):
        return _Refusal(f"no whole answer within {limit:g} s", passing=True)
    status = getattr(error, "status", getattr(error, "code", None))
    refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUS
    reason = " ".join(scrubbed(f"{type(error).__name__}: {error}").split())[:200]
    absent = isinstance(error, FileNotFoundError) or status in ABSENT_STATUS
    return _Refusal(reason, passing=not refused and not isinstance(error, PERMANENT), absent=absent)


def _numbers(start: int, length: int) -> range:
    """The blocks that hold `length` bytes from `start`."""
    return range(start // BLOCK_BYTES, (start + max(length, 1) - 1) // BLOCK_BYTES + 1)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """On fsspec's own loop, which has its own thread."""
    return asyncio.run_coroutine_threadsafe(work, get_loop()).result()
