"""Local files: atomic, durable writes, hashes, and a bounded reader for small files of anybody.

A file that came with a model, a run folder or a data set may be a pipe that nobody writes to, a device without an end,
gigabytes long, or JSON that is nested until the stack is full. `read_file`, `parse_json` and what builds on them refuse
all of it; the rest of the package reads small files through them alone.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megadistill.errors import UserError
from megadistill.outputs import naming
from megadistill.units import readable

_T = TypeVar("_T")

MAX_JSON_BYTES = 16 << 20
MAX_NESTING = 64
"""Objects and lists within each other in a JSON file; those that are read here have 10 at most."""
MAX_VALUES = 8_000_000
"""Values of a JSON file, each of which takes up to 100 bytes of memory: the largest tokenizer.json have 2 million."""
MAX_DIGITS = 100
"""Digits of an integer in a JSON file: enough for the 10^30 that transformers writes as `model_max_length`."""


class NotRegularError(OSError):
    """A pipe, a socket or a device where a file should be."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets the name `path` when all of it is on the disk, and is removed on an error.

    A link keeps its name, and the file that it leads to is replaced; a device or a pipe is written to itself.

    Raises:
        OSError: with the file's name.
    """
    with naming(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "wb") as file:
                yield file
            return
        target = path.resolve() if path.is_symlink() else path
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename == str(temporary):
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise
        sync_folder(target.parent)


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
    """The sha256 of a local file, in hex. Raises OSError: it cannot be read, or is not a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """The opened file, which must be a regular one: a pipe would wait for its writer, and a device has no end.

    Raises:
        OSError: it cannot be opened, or no file can have such a name; of a folder IsADirectoryError, of what else is
            not a regular file NotRegularError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have such a name", repr(str(path))) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    raise NotRegularError(errno.EINVAL, "it is not a regular file", str(path))


def read_file(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a small regular file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is larger than `max_bytes`, of which no more is read.
    """
    content, left = [], max_bytes + 1
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size  # it may grow meanwhile, and those of /proc have none
        at_once = max(size, 1 << 16) + 1  # read(n) allocates n bytes
        while size <= max_bytes and left and (part := file.read(min(left, at_once))):
            content.append(part)
            left -= len(part)
    if size > max_bytes or not left:
        raise ValueError(f"larger than {readable(max_bytes, 'B')}")
    return b"".join(content)


def parse_json(content: bytes, *, constants: bool = False) -> Any:
    """The value of a JSON text of anybody: UTF-8, with or without a byte order mark. Of equal keys the last one counts.

    `constants`: whether it may have `Infinity` and `NaN`, which Python writes and JSON does not have: configs of
    published models with Mamba layers do.

    Raises:
        ValueError: it is damaged or not UTF-8, is nested more than `MAX_NESTING` levels deep, has more than
            `MAX_VALUES` values, or a number that is not finite or has more than `MAX_DIGITS` digits.
    """
    constant = float if constants else _refuse_constant
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")
    try:
        value = json.loads(
            content.decode("utf-8-sig"), parse_float=_finite, parse_int=_integer, parse_constant=constant
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    level, depth = [value], 0
    while parents := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MAX_NESTING:
            raise _too_deep()
        level = [child for each in parents for child in (each.values() if isinstance(each, dict) else each)]
    return value


def _too_deep() -> ValueError:
    return ValueError(f"nested more than {MAX_NESTING} levels deep")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text):,} digits is too large")
    return int(text)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, constants: bool = False) -> Any:
    """The content of a JSON file of anybody, see `parse_json`.

    Raises:
        ValueError: it is damaged, not of the kind that `parse_json` takes, or larger than `max_bytes`.
        OSError: it cannot be read, or is not a regular file.
    """
    return parse_json(read_file(path, max_bytes=max_bytes), constants=constants)


def read_given_json(
    path: Path,
    kind: type[_T],
    *,
    what: str,
    way_out: str,
    max_bytes: int = MAX_JSON_BYTES,
    constants: bool = False,
) -> _T:
    """The JSON object (`kind` dict) or list in a file that a user names; `what` names the input in messages.

    `constants`: see `parse_json`.

    Raises:
        UserError: the file is missing, unreadable, damaged, or holds something else.
    """
    try:
        values = read_json(path, max_bytes=max_bytes, constants=constants)
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist: {way_out}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} cannot be read as JSON: {reason_of(error)}: {way_out}") from None
    if not isinstance(values, kind):
        raise UserError(f"{what}: {path} holds a {type(values).__name__}, not a {kind.__name__}: {way_out}")
    return values


def reason_of(error: OSError | ValueError) -> str:
    """Why a file cannot be read, in one line and without its path."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def locked_folder(folder: Path, *, problem: str | None = None) -> Iterator[None]:
    """Keeps a second process of this kind out of `folder`, which is made, for as long as the context is open.

    The lock leaves no file behind and ends with its process. It does nothing where the file system has no locks.
    Without `problem` it waits for the other process.

    Raises:
        UserError: another process has it; `problem` is the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if problem is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(problem) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
