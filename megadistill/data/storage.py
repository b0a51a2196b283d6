"""Where files of a data set lie: a local folder, mapped into memory, or a URL, read in blocks. It knows no format."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol


class Bytes(Protocol):
    """An open file, read at random. One thread at a time."""

    size: int

    def read(self, start: int, length: int) -> memoryview:
        """`length` bytes from `start`. Raises OSError: they are not there, or cannot be reached."""
        ...


class Folder(Protocol):
    """Files by name. Raises OSError for what is not there, cannot be read, or cannot be reached."""

    location: str
    """The path or the URL, without a slash at the end: what messages say."""

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        """All of a file. Raises OSError: it has more than `max_bytes`, which is never allocated."""
        ...

    def open(self, name: str) -> Bytes: ...

    def sibling(self, path: str) -> "Folder":
        """The folder at `path` relative to this one; one leading `../` is allowed."""
        ...


def folder_of(location: str) -> Folder:
    """The folder at a path, or at a URL `scheme://...`."""
    raise NotImplementedError


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that bears its name only once all of it is on the disk."""
    raise NotImplementedError
