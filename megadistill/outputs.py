"""Places that a command writes to: tried before the work, and what to do where writing failed."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill.errors import UserError

_WAYS_OUT = {
    errno.ENOSPC: "free some space there, or name a place on another disk",
    errno.EDQUOT: "delete files of yours there, or name a place on another disk",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "change the permissions, or name another place",
    errno.EPERM: "change the permissions, or name another place",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name a place on another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.ENOTDIR: "a part of the path is a file: name another place",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EIO: "the disk or the network failed: look at the system's log",
    errno.ESTALE: "the network file system lost it: mount it again",
}
"""Number of an error of the system -> what to do about it."""

_TRIAL_BYTES = 1 << 16
"""Written to a place that is tried: a disk without space for that is full."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The form in which libraries in Rust, such as safetensors, report the system's errors."""


def one_line(error: OSError) -> str:
    """An error of the system as `FILE: what is wrong: what to do`."""
    number = error.errno or 0
    reason = error.strerror or str(error) or type(error).__name__
    subject = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    way_out = f": {_WAYS_OUT[number]}" if number in _WAYS_OUT else ""
    return " ".join(f"{subject}{reason}{way_out}".split())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system that occur while `path` is written name it, those of a library in Rust too.

    Raises:
        OSError: as it was, with a file's name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def is_file_name(path: Path) -> bool:
    """Whether files can be written at a path: safetensors and JSON take only UTF-8, and no name has a NUL byte."""
    try:
        return b"\0" not in str(path).encode()
    except UnicodeEncodeError:  # bytes that are no text, which Python keeps as half of a surrogate pair
        return False


def require_writable_file(path: Path | None, option: str) -> None:
    """Tries whether the file that `option` names can be written, without making or changing it. None: nothing to try.

    Raises:
        UserError: it is a folder, or its folder cannot be made or written to.
    """
    if path is None:
        return
    _require_name(path, f"{option} {path}")
    if path.is_dir():
        raise UserError(f"{option} {path}: it is a folder: name a file")
    if path.exists() and not path.is_file():  # a device, a pipe
        return
    require_writable_folder(path.resolve().parent, option, given=path)


def require_writable_folder(folder: Path | None, option: str, *, given: Path | None = None) -> None:
    """Tries whether the folder that `option` names can be made and written to; leaves nothing there.

    `given`: the path as it was given, if it is another one.

    Raises:
        UserError: it cannot, or it is a file.
    """
    if folder is None:
        return
    where = f"{option} {folder if given is None else given}"
    _require_name(folder if given is None else given, where)
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not there.is_dir():
            raise UserError(f"{where}: {there} is a file, not a folder: name another place")
        with tempfile.TemporaryFile(dir=there) as trial:
            trial.write(bytes(_TRIAL_BYTES))
            trial.flush()
    except OSError as error:
        plain = OSError(error.errno, error.strerror or str(error))
        raise UserError(f"{where} cannot be written: {one_line(plain)}") from None


def _require_name(path: Path, where: str) -> None:
    if not is_file_name(path):
        raise UserError(f"{where} cannot be written: its name has a NUL byte or is not UTF-8")
