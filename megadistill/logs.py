"""Log lines of the package: their format, and where they go (the terminal, log.txt of a run folder)."""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import TextIO

from megadistill.redaction import printable_line, printable_lines, without_secrets

PACKAGE = logging.getLogger("megadistill")
INDENT = "    "
FIELD = " | "
"""Between the fields of a line of metrics."""
NO_BREAK = "\N{NO-BREAK SPACE}"
ERASE_LINE = "\r\x1b[2K"


def configure(rank: int, *, replica: str | None = None) -> None:
    """Sends log lines to the terminal: warnings and errors of all ranks to stderr, INFO of rank 0 to stdout.

    `replica`: its number, where this process is one of a replica that is a launch of its own.

    From here on the records of every library are `_Record`s, whoever prints them.
    """
    logging.setLogRecordFactory(_Record)
    for former in PACKAGE.handlers[:]:
        PACKAGE.removeHandler(former)
        former.close()
    handler = _TerminalHandler(rank, replica)
    handler.setFormatter(_Formatter(rank, replica))
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def log_run(*, here: bool) -> None:
    """INFO lines, which are about the whole run, come from this process, or from one of another replica's launch.

    Before this call each replica's first rank logs its own start, as `configure` says.
    """
    PACKAGE.setLevel(logging.INFO if here else logging.WARNING)


def add_file(path: Path, rank: int) -> None:
    """Appends log lines to a file as well, until the process ends or `configure` is called; twice is once."""
    files = [each.baseFilename for each in PACKAGE.handlers if isinstance(each, logging.FileHandler)]
    if str(path.absolute()) in files:
        return
    handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter(rank))
    PACKAGE.addHandler(handler)


class _Record(logging.LogRecord):
    """A record whose message cannot control a terminal, has no secret, and is not 100 MB long.

    In the package's own messages a value is one line: a name with a newline cannot pass for another log line.
    """

    def getMessage(self) -> str:
        if self.args and isinstance(self.args, tuple) and self.name.split(".")[0] == PACKAGE.name:
            values = (each if isinstance(each, int | float) else _PrintableValue(each) for each in self.args)
            return printable_lines(str(self.msg) % tuple(values))
        return printable_lines(super().getMessage())


class _PrintableValue:
    """A value of a message, by %s or %r."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return printable_line(" ".join(str(self._value).splitlines()))

    def __repr__(self) -> str:
        return printable_line(repr(self._value))


class _Formatter(logging.Formatter):
    """`2026-11-28 19:30:00,123 INFO rank 0 megadistill.train.loop: MESSAGE`, without secrets."""

    def __init__(self, rank: int, replica: str | None = None) -> None:
        whose = f"rank {rank}" if replica is None else f"replica {replica} rank {rank}"
        super().__init__(f"%(asctime)s %(levelname)s {whose} %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _TerminalFormatter(logging.Formatter):
    """`19:30:00 MESSAGE`, with level and rank where they are not INFO and 0, without secrets.

    A message that does not fit into a line goes on in the next one, indented, between two words or two `|`.
    """

    def __init__(self, rank: int, replica: str | None = None) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self._whose = f"{f'replica {replica} ' * (replica is not None)}{f'rank {rank} ' * (rank != 0)}"

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname} " if record.levelno != logging.INFO else ""
        rank = f"{self._whose.rstrip()}: " if self._whose else ""
        head, *rest = without_secrets(super().format(record)).split("\n")
        time, _, message = head.partition(" ")
        width = get_terminal_size().columns - 1  # a full line would wrap where a terminal leaves no space for the end
        lines = _wrapped(f"{time} {level}{rank}{message}", width)
        return "\n".join([*lines, *rest])


def _wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns, where its words allow it. Lines after the first are indented.

    Fields that ` | ` separates stay in one piece.
    """
    fields = [field.replace(" ", NO_BREAK) for field in text.split(FIELD)]
    joined = text if len(fields) == 1 else f"{NO_BREAK}| ".join(fields)
    lines = wrap(
        joined, width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return [line.replace(NO_BREAK, " ") for line in lines] or [""]


class _QuietOnOsError(logging.StreamHandler[TextIO]):
    """A full disk or a closed terminal costs the line, and no traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


class _TerminalHandler(_QuietOnOsError):
    """Looks up sys.stdout and sys.stderr for each line: a progress bar replaces them to keep itself below the lines.

    On a terminal lines are short, and fit its width; elsewhere (a file, a pipe) they are those of log.txt.
    """

    def __init__(self, rank: int, replica: str | None = None) -> None:
        super().__init__()
        self._rank = rank
        self._short = _TerminalFormatter(rank, replica)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with suppress(SystemExit):  # rich exits the process when its terminal is gone
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        terminal = getattr(self.stream, "rich_proxied_file", self.stream)  # below a progress bar
        if not terminal.isatty():
            return super().format(record)
        # Rank 0's progress bar may be where the cursor is: another rank's line replaces it, until it is drawn again.
        return f"{ERASE_LINE if self._rank else ''}{self._short.format(record)}"


class _FileHandler(logging.FileHandler, _QuietOnOsError):
    pass
