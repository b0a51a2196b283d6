"""Local storage: a folder of this machine's file system, its files mapped into memory."""

import errno
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from megadistill.data.storage.base import Bytes, out_of_range, refuse_larger
from megadistill.io import open_regular

SETTLED_NS: Final = 2 * 10**9
"""A file that was written less than this before may be written again at the same time of its file system's clock."""


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self.location = str(self._path)

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        path = self._path / name
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            refuse_larger(str(path), size, max_bytes)
            return file.read(size)  # of `max_bytes` as many would be allocated

    def open(self, name: str) -> "MappedFile":
        return MappedFile(self._path / name)

    def prefetch(self, ranges: Iterable[tuple[Bytes, int, int]]) -> None:
        pass  # the page cache does it

    def sibling(self, path: str) -> "LocalFolder":
        return LocalFolder(self._path / path)


class MappedFile:
    """A file mapped into memory: reads copy nothing. It must not shrink while it is open."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            self.size = status.st_size
            changed = status.st_mtime_ns, status.st_ctime_ns  # a copy may set the first to that of the file before it
            settled = time.time_ns() - max(changed) > SETTLED_NS
            self.identity: object = (status.st_dev, status.st_ino, *changed) if settled else None
            if self.size == 0:
                raise OSError(errno.EINVAL, "it is empty", str(path))
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._path = path

    def read(self, start: int, length: int) -> memoryview:
        stop = start + length
        if not 0 <= start <= stop <= self.size:
            raise out_of_range(str(self._path), start, length, self.size)
        return self._bytes[start:stop]
