"""Files of JSON lines: appending whole lines, and reading them from either end, whatever else is in them."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from megadistill.errors import UserError
from megadistill.io import NotRegularError, open_regular

MAX_LINE_BYTES = 1 << 20
BLOCK_BYTES = 1 << 18
"""Bytes that are read at once from the end of a file: some 400 steps of metrics.jsonl."""


class JsonLines:
    """Appends to a file of JSON lines, each with one write. Lines that a full disk refuses are written later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def append(self, values: Mapping[str, Any]) -> str | None:
        """Writes a line. Returns the disk's error, or None."""
        self._waiting.append((json.dumps(values) + "\n").encode())
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            return str(error)
        try:
            while self._waiting:
                _append_whole(descriptor, self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            return str(error)
        finally:
            os.close(descriptor)
        return None


def _append_whole(descriptor: int, line: bytes) -> None:
    """Writes a line at once, so that lines of several processes do not mix; a partial write is undone.

    A last line that a crash left without its newline gets one first, or this line would be lost with it.
    """
    size = os.fstat(descriptor).st_size
    if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    written = os.write(descriptor, line)
    if written < len(line):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def scan_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Number (from 1), bytes and object of each line of a .jsonl file that is not blank; None for a damaged line.

    A missing file has none. Read line by line, as a run of a million steps writes half a gigabyte; of a line above
    `MAX_LINE_BYTES` the rest is passed over. The last line is left out where a kill has cut off its end.

    Raises:
        UserError: a folder, a pipe or a device has its name.
    """
    file = _opened(path)
    if file is None:
        return
    number = 0
    with file:
        while part := file.readline(MAX_LINE_BYTES):
            number += 1
            line, is_too_long = part, False
            while not part.endswith(b"\n") and (part := file.readline(MAX_LINE_BYTES)):
                is_too_long = True
            values = None if is_too_long else _object_of(line)
            if values is None and not part:
                return
            if is_too_long or line.strip():
                yield number, line, values


def _opened(path: Path) -> BufferedReader | None:
    """The opened file; None where there is none."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        return None
    except (IsADirectoryError, NotRegularError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): move it away") from None


def _object_of(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object of each line of a .jsonl file, None for a damaged line, see `scan_lines`."""
    return (values for _, _, values in scan_lines(path))


class LineFromEnd(NamedTuple):
    """A line of a file that is read from its end."""

    offset: int
    """Position of its first byte in the file."""
    end: int
    """Position behind it and its newline."""
    values: dict[str, Any] | None
    """None for a damaged line."""


def lines_from_end(path: Path) -> Iterator[LineFromEnd]:
    """The lines of `scan_lines` from the last to the first: what is not taken is not read, but for a block.

    Raises:
        UserError: a folder, a pipe or a device has its name.
    """
    file = _opened(path)
    if file is None:
        return
    with file:
        size = end = position = os.fstat(file.fileno()).st_size
        is_cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        block = b""  # the bytes from `position` on, up to `end` at least, but for the end of a line that is too long
        while end > 0:
            newline = block.rfind(b"\n", 0, max(0, end - 1 - position))
            if newline < 0 and position > 0:
                line = block[: end - position]
                step = min(BLOCK_BYTES, position)
                position -= step
                file.seek(position)
                block = file.read(step) + (line if len(line) <= MAX_LINE_BYTES else b"")
                continue
            begin = position + newline + 1
            line = block[newline + 1 : end - position]
            values = _object_of(line) if end - begin <= MAX_LINE_BYTES else None
            is_blank = end - begin <= MAX_LINE_BYTES and not line.strip()
            if values is not None or not (is_blank or is_cut):
                yield LineFromEnd(begin, end, values)
            end, is_cut = begin, False
