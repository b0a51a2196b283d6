"""Local files: atomic, durable writes, hashes, and JSON of a bounded size."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megadistill.errors import UserError

_T = TypeVar("_T")

MAX_JSON_BYTES = 16 << 20


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


def write_json(path: Path, value: Any) -> None:
    """Writes values, dataclasses among them, as a JSON file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(value, default=asdict, indent=1, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The sha256 of a local file, in hex. Raises OSError: the file cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, *, max_bytes: int | None = None) -> Any:
    """The content of a JSON file of anybody.

    Raises:
        ValueError: it is damaged, nested too deeply, or larger than `max_bytes` (`MAX_JSON_BYTES`).
        OSError: it cannot be read.
    """
    limit = MAX_JSON_BYTES if max_bytes is None else max_bytes
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_given_json(path: Path, kind: type[_T], *, what: str, way_out: str, max_bytes: int | None = None) -> _T:
    """The JSON object (`kind` dict) or list in a file that a user names; `what` names the input in messages.

    Raises:
        UserError: the file is missing, unreadable, damaged, or holds something else.
    """
    try:
        values = read_json(path, max_bytes=max_bytes)
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist: {way_out}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} cannot be read as JSON: {error}: {way_out}") from None
    if not isinstance(values, kind):
        raise UserError(f"{what}: {path} holds a {type(values).__name__}, not a {kind.__name__}: {way_out}")
    return values


@contextmanager
def locked_folder(folder: Path, *, problem: str) -> Iterator[None]:
    """Keeps a second process of this kind out of `folder`, which is made, for as long as the context is open.

    The lock leaves no file behind and ends with its process. It does nothing where the file system has no locks.

    Raises:
        UserError: another process has it; `problem` is the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(problem) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
