"""Remote storage: files behind URLs, read in whole aligned blocks by ranged requests that are retried.

One cache of blocks, bounded in bytes, serves all files of a folder. A response is untrusted input: one that is longer
or shorter than the requested range is an error, whatever its status.
"""

import asyncio
import errno
import random
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import fsspec
from fsspec.asyn import get_loop, sync

from megadistill.data.storage.base import Bytes, out_of_range, refuse_larger
from megadistill.errors import UserError
from megadistill.redaction import redact, redact_url

_T = TypeVar("_T")

BLOCK_BYTES: Final = 1 << 20
CACHE_BYTES: Final = 512 << 20
REQUESTS: Final = 16
"""Concurrent requests of one folder."""

ABSENT_STATUS: Final = (404, 410)
PERMANENT: Final = (FileNotFoundError, PermissionError, IsADirectoryError)
_TAGS: Final = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated")
"""Keys under which file systems of fsspec give a file's tag, or the time of its last change."""
TRANSIENT_STATUS: Final = (408, 425, 429)
"""Client errors that are worth another attempt."""


@dataclass(frozen=True)
class RetryPolicy:
    """Attempts of a request, and times in seconds."""

    attempts: int = 6
    timeout: float = 30.0
    """Time limit of one attempt."""
    pause: float = 0.5
    """Approximate wait before the second attempt; it doubles before each further one."""
    max_pause: float = 20.0

    def pause_before(self, attempt: int) -> float:
        """Exponential backoff, drawn from its upper half so that the ranks of a cluster do not retry at once."""
        return min(self.max_pause, self.pause * 2.0 ** (attempt - 2)) * _jitter.uniform(0.5, 1.0)


_jitter = random.Random()  # its own generator: a retry must not change a seeded stream


class RequestError(Exception):
    """A failed attempt; `transient`: another one may succeed; `absent`: there is no such file."""

    def __init__(self, reason: str, *, transient: bool, absent: bool = False) -> None:
        super().__init__(reason)
        self.transient = transient
        self.absent = absent


class RemoteFolder:
    """A folder behind a URL of any scheme that fsspec knows."""

    def __init__(self, location: str, *, cache_bytes: int = CACHE_BYTES, retry: RetryPolicy | None = None) -> None:
        """Makes no request yet.

        Raises:
            UserError: the scheme is unknown, or its package is not installed.
        """
        self._url = location.rstrip("/")
        self.location = redact_url(self._url)
        self._retry = retry or RetryPolicy()
        self._cache_bytes = cache_bytes
        self._blocks = _Blocks(max(1, cache_bytes // BLOCK_BYTES))
        self._errors: dict[_Key, OSError] = {}
        self._backend = _backend(self._url)
        self._given_up = False

    def open(self, name: str) -> "RemoteFile":
        size, tag = sync(get_loop(), self._with_retries, name, "its size", self._backend.status)
        return RemoteFile(self, name, size, tag)

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        file = self.open(name)
        refuse_larger(f"{self.location}/{name}", file.size, max_bytes)
        return bytes(file.read(0, file.size))

    def sibling(self, path: str) -> "RemoteFolder":
        parent, _, _ = self._url.rpartition("/")
        url = f"{parent}/{path[3:]}" if path.startswith("../") else f"{self._url}/{path}"
        return RemoteFolder(url, cache_bytes=self._cache_bytes, retry=self._retry)

    def prefetch(self, ranges: Iterable[tuple[Bytes, int, int]]) -> None:
        sizes: dict[_Key, int] = {}
        for file, start, length in ranges:
            assert isinstance(file, RemoteFile)
            for number in _numbers(start, length):
                sizes[file.name, number] = file.size
        self._errors.clear()
        missing = [key for key in sizes if self._blocks.get(key) is None][: self._blocks.capacity]
        if not missing:
            return
        for key, block in zip(missing, sync(get_loop(), self._fetch_all, missing, sizes), strict=True):
            if isinstance(block, OSError):
                self._errors[key] = block

    def block(self, name: str, number: int, size: int) -> memoryview:
        """Block `number` of a file of `size` bytes. Raises OSError: it could not be fetched, now or by `prefetch`."""
        key = name, number
        block = self._blocks.get(key)
        if block is not None:
            return block
        if key in self._errors:
            raise self._errors[key]
        fetched: memoryview = sync(get_loop(), self._fetch, key, size)
        return fetched

    async def _fetch_all(self, keys: list["_Key"], sizes: dict["_Key", int]) -> list[memoryview | OSError]:
        limit = asyncio.Semaphore(REQUESTS)

        async def fetch(key: _Key) -> memoryview | OSError:
            async with limit:
                try:
                    return await self._fetch(key, sizes[key])
                except OSError as error:
                    return error

        return list(await asyncio.gather(*map(fetch, keys)))

    async def _fetch(self, key: "_Key", size: int) -> memoryview:
        name, number = key
        start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, size)

        async def get(url: str) -> bytes:
            data = await self._backend.get(url, start, stop)
            if len(data) != stop - start:
                raise RequestError(f"the response has {len(data)} bytes, not {stop - start}", transient=True)
            return data

        block = memoryview(await self._with_retries(name, f"bytes {start} to {stop}", get))
        self._blocks.put(key, block)
        return block

    async def _with_retries(self, name: str, subject: str, request: Callable[[str], Awaitable[_T]]) -> _T:
        """The result of `request(url)`. While the last request failed for good, the next has one attempt."""
        url, retry = f"{self._url}/{name}", self._retry
        attempts = 1 if self._given_up else retry.attempts
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                await asyncio.sleep(retry.pause_before(attempt))
            try:
                result = await asyncio.wait_for(request(url), retry.timeout)
            except Exception as error:  # file systems of fsspec raise many kinds
                failure = _request_error(error, retry.timeout)
                if not failure.transient:
                    break
            else:
                self._given_up = False
                return result
        self._given_up = failure.transient
        tries = f"{attempt} attempt{'s' if attempt > 1 else ''}"
        number = errno.ENOENT if failure.absent else errno.EIO  # OSError is FileNotFoundError by its number
        raise OSError(number, f"{subject} could not be read in {tries}: {failure}", redact_url(url))


class RemoteFile:
    """An open file of a RemoteFolder."""

    def __init__(self, folder: RemoteFolder, name: str, size: int, tag: str | None) -> None:
        if size == 0:
            raise OSError(errno.EINVAL, "it is empty", f"{folder.location}/{name}")
        self._folder = folder
        self.name = name
        self.size = size
        self.identity: object = tag

    def read(self, start: int, length: int) -> memoryview:
        if not 0 <= start <= start + length <= self.size:
            raise out_of_range(f"{self._folder.location}/{self.name}", start, length, self.size)
        parts = []
        for number in _numbers(start, length):
            begin = number * BLOCK_BYTES
            block = self._folder.block(self.name, number, self.size)
            parts.append(block[max(0, start - begin) : start + length - begin])
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


_Key = tuple[str, int]
"""A block: its file's name, and its number in the file."""


class _Blocks:
    """Cache of the `capacity` blocks used last; for several threads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
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
            if len(self._blocks) > self.capacity:
                self._blocks.popitem(last=False)


class HttpBackend:
    """http:// and https://, through fsspec's session: status and length are checked before the body is read."""

    def __init__(self, files: Any) -> None:
        self._files = files

    async def status(self, url: str) -> tuple[int, str | None]:
        """Size in bytes, and the tag or the time of the last change where the server gives one."""
        async with self._ranged_get(url, 0, 1) as response:
            _, total = _content_range(response)
            return total, response.headers.get("ETag") or response.headers.get("Last-Modified")

    async def get(self, url: str, start: int, stop: int) -> bytes:
        async with self._ranged_get(url, start, stop) as response:
            (first, last), _ = _content_range(response)
            if (first, last) != (start, stop - 1) or response.content_length not in (None, stop - start):
                raise RequestError(
                    f"the response is bytes {first} to {last + 1}, {response.content_length} bytes long", transient=True
                )
            data: bytes = await response.content.readexactly(stop - start)
            return data

    @asynccontextmanager
    async def _ranged_get(self, url: str, start: int, stop: int) -> AsyncIterator[Any]:
        session = await self._files.set_session()
        options = dict(self._files.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        async with session.get(self._files.encode_url(url), headers=headers, **options) as response:
            if response.status >= 400 and response.status != 416:
                transient = response.status >= 500 or response.status in TRANSIENT_STATUS
                absent = response.status in ABSENT_STATUS
                raise RequestError(f"{response.status} {response.reason}", transient=transient, absent=absent)
            if response.status not in (206, 416):
                raise RequestError(
                    f"status {response.status}: the server does not support ranged requests", transient=False
                )
            yield response


def _content_range(response: Any) -> tuple[tuple[int, int], int]:
    """First and last byte, and bytes of the whole file: `bytes 0-99/1234`; `bytes */0` for an empty one."""
    header = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", header)
    if not match:
        raise RequestError(f"status {response.status} with Content-Range {header[:60]!r}", transient=False)
    first, last, total = match.groups()
    return (int(first or 0), int(last or -1)), int(total)


class FsspecBackend:
    """Every other scheme, through its file system of fsspec."""

    def __init__(self, files: Any) -> None:
        self._files = files

    async def status(self, url: str) -> tuple[int, str | None]:
        """Size in bytes, and the tag or the time of the last change where the store gives one."""
        path = self._files._strip_protocol(url)
        # fsspec's own names for the coroutines of an asynchronous file system
        info = await (self._files._info(path) if self._files.async_impl else asyncio.to_thread(self._files.info, path))
        if not isinstance(info.get("size"), int):
            raise RequestError("its size is not known", transient=False)
        tag = next((info[key] for key in _TAGS if info.get(key)), None)
        return info["size"], None if tag is None else str(tag)

    async def get(self, url: str, start: int, stop: int) -> bytes:
        path = self._files._strip_protocol(url)
        if self._files.async_impl:
            data: bytes = await self._files._cat_file(path, start=start, end=stop)
            return data
        return await asyncio.to_thread(self._files.cat_file, path, start=start, end=stop)


def _backend(url: str) -> HttpBackend | FsspecBackend:
    """The requests for a URL: they run on fsspec's event loop, and may raise any exception."""
    scheme = url.partition("://")[0]
    try:
        files, _ = fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{redact_url(url)} needs a package that is not installed ({redact(str(error))}): "
            f"pip install 'megadistill[remote]', and the package of {scheme}://"
        ) from None
    except ValueError as error:
        raise UserError(f"{redact_url(url)} cannot be read: {redact(str(error))}: give a path or another URL") from None
    return HttpBackend(files) if scheme in ("http", "https") else FsspecBackend(files)


def _request_error(error: Exception, timeout: float) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, TimeoutError):
        return RequestError(f"no complete response within {timeout:g} s", transient=True)
    status = getattr(error, "status", getattr(error, "code", None))
    refused = isinstance(status, int) and 400 <= status < 500 and status not in TRANSIENT_STATUS
    reason = " ".join(redact(f"{type(error).__name__}: {error}").split())[:200]
    absent = isinstance(error, FileNotFoundError) or status in ABSENT_STATUS
    return RequestError(reason, transient=not refused and not isinstance(error, PERMANENT), absent=absent)


def _numbers(start: int, length: int) -> range:
    """The blocks that hold `length` bytes from `start`."""
    return range(start // BLOCK_BYTES, (start + max(length, 1) - 1) // BLOCK_BYTES + 1)
