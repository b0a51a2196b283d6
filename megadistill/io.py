"""Local files: atomic, durable writes, hashes, and JSON of a bounded size."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 16 << 20

HASH_BYTES = 1 << 22
"""Bytes hashed at a time."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets the name `path` when all of it is on the disk, and is removed on an error."""
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
    sync_folder(path.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a whole file by `atomic_write`; text as UTF-8."""
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a local file, in hex. `progress` is called with each number of bytes read.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(HASH_BYTES):
            digest.update(part)
            if progress:
                progress(len(part))
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file of anybody.

    Raises:
        ValueError: it is damaged, nested too deeply, or larger than `MAX_JSON_BYTES`.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
