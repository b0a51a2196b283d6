"""Where files of a data set lie: a local folder, mapped into memory, or a URL, read in blocks. It knows no format."""

import errno
import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

HASH_BYTES = 1 << 22
"""Hashed at a time."""


class Bytes(Protocol):
    """An open file, read at random. One thread at a time."""

    size: int

    def read(self, start: int, length: int) -> memoryview:
        """`length` bytes from `start`. Raises OSError: they are not there, or cannot be reached."""
        ...


class Folder(Protocol):
    """Files by name. Raises OSError for what is not there, is empty, cannot be read, or cannot be reached."""

    location: str
    """The path or the URL, without a slash at the end: what messages say. Credentials are left out of it."""

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        """All of a file. Raises OSError: it has more than `max_bytes`, which is never allocated."""
        ...

    def open(self, name: str) -> Bytes: ...

    def prefetch(self, ranges: Iterable[tuple[Bytes, int, int]]) -> None:
        """Fetches ranges (file, start, length) of open files at the same time, for the reads that follow.

        What cannot be fetched is an error of those reads. Nothing happens, and `ranges` is not consumed, where files
        are mapped.
        """
        ...

    def sibling(self, path: str) -> "Folder":
        """The folder at `path` relative to this one; one leading `../` is allowed."""
        ...


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self.location = str(self._path)

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        path = self._path / name
        with _opened(path) as file:
            refuse_larger(str(path), os.fstat(file.fileno()).st_size, max_bytes)
            return file.read(max_bytes)

    def open(self, name: str) -> "MappedFile":
        return MappedFile(self._path / name)

    def prefetch(self, ranges: Iterable[tuple[Bytes, int, int]]) -> None:
        pass  # the page cache does it

    def sibling(self, path: str) -> "LocalFolder":
        return LocalFolder(self._path / path)


class MappedFile:
    """A file mapped into memory: reads copy nothing. It must not shrink while it is open."""

    def __init__(self, path: Path) -> None:
        with _opened(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise OSError(errno.EINVAL, "it is empty", str(path))
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._path = path

    def read(self, start: int, length: int) -> memoryview:
        stop = start + length
        if not 0 <= start <= stop <= self.size:
            raise outside(str(self._path), start, length, self.size)
        return self._bytes[start:stop]


def refuse_larger(path: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {max_bytes} allowed", path)


def outside(path: str, start: int, length: int, size: int) -> OSError:
    return OSError(errno.EINVAL, f"it has {size} bytes, none from {start} to {start + length}", path)


def _opened(path: Path) -> BinaryIO:
    """A regular file: a pipe would wait for its writer, and a device has no size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that bears its name only once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def sha256_of(file: Bytes, *, progress: Callable[[int], None] | None = None) -> str:
    """Of all of an open file; `progress` is told how many bytes were hashed, after each part.

    Raises:
        OSError: a part cannot be read.
    """
    digest = hashlib.sha256()
    for start in range(0, file.size, HASH_BYTES):
        length = min(HASH_BYTES, file.size - start)
        digest.update(file.read(start, length))
        if progress:
            progress(length)
    return digest.hexdigest()


def file_sha256(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """Of a local file, which may be empty. Raises OSError: it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(HASH_BYTES):
            digest.update(part)
            if progress:
                progress(len(part))
    return digest.hexdigest()


def shown(location: Path | str) -> str:
    """A path as it is; a URL without its credentials: no user, no password, no query."""
    scheme, mark, rest = str(location).partition("://")
    if not mark:
        return scheme
    return scheme + mark + re.sub(r"^[^/]*@", "", rest.partition("?")[0])


def scrubbed(message: str) -> str:
    """A message whose URLs are `shown`."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda url: shown(url[0]), message)
