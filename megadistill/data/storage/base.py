"""Interface of the storage backends: files of a folder by name, read at random."""

import errno
import hashlib
from collections.abc import Iterable
from typing import Final, Protocol

HASH_BYTES: Final = 1 << 22
"""Bytes hashed at a time."""


class Bytes(Protocol):
    """An open file, read at random. One thread at a time."""

    size: int
    identity: object
    """Inode and times, or the tag in a store: equal for a file of one size that has not changed. None: not known."""

    def read(self, start: int, length: int) -> memoryview:
        """`length` bytes from `start`. Raises OSError: out of range, or unreachable."""
        ...


class Folder(Protocol):
    """Files by name. Raises OSError for a file that is missing, empty, unreadable or unreachable."""

    location: str
    """The path or the URL for messages, without a slash at the end and without credentials."""

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        """All of a file. Raises OSError also where it has more than `max_bytes`; they are never allocated."""
        ...

    def open(self, name: str) -> Bytes: ...

    def prefetch(self, ranges: Iterable[tuple[Bytes, int, int]]) -> None:
        """Fetches ranges (file, start, length) of open files at the same time, for the reads that follow.

        A failed fetch is an error of the read that needs it. Mapped files need none: `ranges` is not consumed.
        """
        ...

    def sibling(self, path: str) -> "Folder":
        """The folder at `path` relative to this one; one leading `../` is allowed."""
        ...


def refuse_larger(path: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {max_bytes} allowed", path)


def out_of_range(path: str, start: int, length: int, size: int) -> OSError:
    return OSError(errno.EINVAL, f"it has {size} bytes, none from {start} to {start + length}", path)


def sha256_of(file: Bytes) -> str:
    """The sha256 of an open file. Raises OSError: a part cannot be read."""
    digest = hashlib.sha256()
    for start in range(0, file.size, HASH_BYTES):
        digest.update(file.read(start, min(HASH_BYTES, file.size - start)))
    return digest.hexdigest()
