"""Checkpoints of a run that may delete them while they are read."""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megadistill.errors import UserError
from megadistill.redaction import printable

logger = logging.getLogger(__name__)

LOCK = ".lock"


class CheckpointDeletedError(UserError):
    """A run deleted a checkpoint before it was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{printable(str(folder))}: the run deleted it before it was read: run the command again, and let the run "
            "keep more (checkpoint.keep_last)"
        )


@contextmanager
def sole_writer(folder: Path, command: str) -> Iterator[None]:
    """Keeps a second process from writing to `folder`, which is made, and removes what a killed one left there.

    A pin that is left over keeps the disk space of a checkpoint. On a file system without locks nothing is kept away
    and nothing removed.

    Raises:
        UserError: another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `{command}` is writing to {printable(str(folder))}: wait for its end") from None
        except OSError:
            pass
        else:
            for left in folder.glob(".?*-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def pinned(folders: Sequence[Path], *, within: Path) -> Iterator[list[Path]]:
    """The checkpoints under second names (hard links) in a temporary folder in `within`.

    A run that deletes a checkpoint removes its own names alone, and waits for nobody. On a file system without hard
    links the checkpoints are returned where they lie, with a line in the log. Nothing of the run is changed.

    Raises:
        CheckpointDeletedError: a checkpoint was deleted before it had its second name.
    """
    with tempfile.TemporaryDirectory(dir=within, prefix=".pinned-") as beside:
        links = [Path(beside) / folder.name for folder in folders]
        try:
            for folder, link in zip(folders, links, strict=True):
                _link_files(folder, link)
        except FileNotFoundError:
            raise CheckpointDeletedError(folder) from None
        except OSError as error:
            logger.warning(
                "%s: no hard links there (%s): checkpoints are read in place, and are lost where the run deletes them",
                printable(str(within)),
                error.strerror,
            )
            links = list(folders)
        yield links


def _link_files(folder: Path, link: Path) -> None:
    link.mkdir()
    for name in os.listdir(folder):
        os.link(folder / name, link / name)
