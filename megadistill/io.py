"""Durable writes and hashes of local files."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

HASH_BYTES = 1 << 22
"""Bytes hashed at a time."""


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


def file_sha256(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """Of a local file, which may be empty. Raises OSError: it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(HASH_BYTES):
            digest.update(part)
            if progress:
                progress(len(part))
    return digest.hexdigest()
