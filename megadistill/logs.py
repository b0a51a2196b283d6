"""Log lines of the package: their format, and where they go (the terminal, log.txt of a run folder)."""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from megadistill.redaction import without_secrets

PACKAGE = logging.getLogger("megadistill")


def configure(rank: int) -> None:
    """Sends log lines to the terminal: warnings and errors of all ranks to stderr, INFO of rank 0 to stdout."""
    for former in PACKAGE.handlers[:]:
        PACKAGE.removeHandler(former)
        former.close()
    handler = _TerminalHandler()
    handler.setFormatter(_Formatter(rank))
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def add_file(path: Path, rank: int) -> None:
    """Appends log lines to a file as well, until the process ends or `configure` is called."""
    handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter(rank))
    PACKAGE.addHandler(handler)


class _Formatter(logging.Formatter):
    """`2026-11-28 19:30:00,123 INFO rank 0 megadistill.train.loop: MESSAGE`, without secrets."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _QuietOnOsError(logging.StreamHandler[TextIO]):
    """A full disk or a closed terminal costs the line, and no traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


class _TerminalHandler(_QuietOnOsError):
    """Looks up sys.stdout and sys.stderr for each line: a progress bar replaces them to keep itself below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with suppress(SystemExit):  # rich exits the process when its terminal is gone
            super().emit(record)


class _FileHandler(logging.FileHandler, _QuietOnOsError):
    pass
