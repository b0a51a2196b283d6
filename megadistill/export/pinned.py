"""Checkpoints of a run that may delete them while they are read."""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megadistill.errors import UserError
from megadistill.redaction import printable

logger = logging.getLogger(__name__)


@contextmanager
def pinned(folders: Sequence[Path], *, within: Path) -> Iterator[list[Path]]:
    """The checkpoints under second names (hard links) in a temporary folder in `within`, which is made.

    A run that deletes a checkpoint removes its own names alone, and waits for nobody. On a file system without hard
    links the checkpoints are returned where they lie, with a line in the log. Nothing of the run is changed.

    Raises:
        UserError: a checkpoint was deleted before it had its second name.
    """
    within.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=within, prefix=".pinned-") as beside:
        links = [Path(beside) / folder.name for folder in folders]
        try:
            for folder, link in zip(folders, links, strict=True):
                _link_files(folder, link)
        except FileNotFoundError:
            raise UserError(deleted(folder)) from None
        except OSError as error:
            logger.warning(
                "%s: no hard links there (%s): checkpoints are read in place, and are lost where the run deletes them",
                printable(str(within)),
                error.strerror,
            )
            links = list(folders)
        yield links


def deleted(folder: Path) -> str:
    """One line on a checkpoint that its run deleted while it was read."""
    return (
        f"{printable(str(folder))}: the run deleted it before it was read: run the command again, and let the run keep "
        "more (checkpoint.keep_last)"
    )


def _link_files(folder: Path, link: Path) -> None:
    link.mkdir()
    for name in os.listdir(folder):
        os.link(folder / name, link / name)
