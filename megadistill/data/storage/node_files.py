"""Files that the processes of one node share: a copy of a remote file, and an array of numbers.

Both lie in the folder for temporary files (TMPDIR), in one of the user's own, and outlive the processes.
"""

import errno
import fcntl
import mmap
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.storage.base import Bytes, Folder, sha256_of
from megadistill.data.storage.local import LocalFolder, MappedFile
from megadistill.io import atomic_write

COPY_BYTES: Final = 64 << 20
"""Bytes fetched at a time."""


def open_copy(folder: Folder, name: str, *, size: int, sha256: str) -> Bytes:
    """The file `name` of `folder`, mapped. One process of a node fetches a remote file; the others wait, and map it.

    The copy lies in the folder for temporary files (TMPDIR) under its sha256. One of another content is fetched again;
    what was fetched is for the caller to hash.

    Raises:
        OSError: it is missing or unreachable, a remote one has another size, or the copy cannot be written.
    """
    if isinstance(folder, LocalFolder):
        return folder.open(name)
    folder = folder.sibling("")  # with a cache of its own, which ends with the copy
    remote = folder.open(name)
    if remote.size != size:
        return remote
    copies = _own_folder()
    copy = copies / sha256
    with open(copies / f"{sha256}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(copy, size, sha256):
            with atomic_write(copy) as file:
                for start in range(0, size, COPY_BYTES):
                    length = min(COPY_BYTES, size - start)
                    folder.prefetch([(remote, start, length)])
                    file.write(remote.read(start, length))
    return MappedFile(copy)


def shared_array(name: str, count: int) -> NDArray[np.int64]:
    """[count] numbers, 0 at first, that every process of this node with the same `name` and `count` reads and writes.

    Where the disk is full, or there is no such folder, it is this process's own.
    """
    try:
        path = _own_folder() / f"{name}-{count}"
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, count * 8)  # a page that the disk cannot hold would end the process
            return np.frombuffer(mmap.mmap(file.fileno(), count * 8), dtype=np.int64)
    except OSError:
        return np.zeros(count, dtype=np.int64)


def _own_folder() -> Path:
    """Raises OSError: it belongs to another user, others may write to it, or it cannot be made."""
    folder = Path(tempfile.gettempdir(), f"megadistill-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(errno.EPERM, f"other users may write to {folder}: delete it, or set TMPDIR")
    return folder


_whole: dict[Path, Any] = {}
"""Copies that this process has hashed, and what tells that each is still the same file."""


def _is_whole(copy: Path, size: int, sha256: str) -> bool:
    try:
        file = MappedFile(copy)
        identity = file.identity
        if identity is not None and _whole.get(copy) == identity:
            return True
        is_whole = file.size == size and sha256_of(file) == sha256
    except OSError:
        return False
    if is_whole and identity is not None:
        _whole[copy] = identity
    return is_whole
