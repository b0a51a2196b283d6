"""What every storage backend offers: files of a folder by name, read at random."""

import errno
import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

from megadistill.io import HASH_BYTES


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


def refuse_larger(path: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {max_bytes} allowed", path)


def outside(path: str, start: int, length: int, size: int) -> OSError:
    return OSError(errno.EINVAL, f"it has {size} bytes, none from {start} to {start + length}", path)


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
