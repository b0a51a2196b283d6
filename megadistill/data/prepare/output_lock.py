"""Locking an output folder while it is written, and removing what a complete data set does not need."""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from megadistill.data.prepare.shard_tasks import HELDOUT, SHARD_PATTERN, TRAIN
from megadistill.data.prepare.tokenizer_training import RECORD
from megadistill.data.shards.manifest import MANIFEST, Manifest
from megadistill.data.shards.shard_record import remove_unlisted
from megadistill.errors import UserError

TOKENIZER_FOLDER: Final = "tokenizer"
INCOMPLETE: Final = ".incomplete"
"""Marker file of an output that is not complete; locked while a process writes there."""


def is_incomplete(output: Path) -> bool:
    """Whether a start writes there, or was broken off."""
    return (output / INCOMPLETE).exists()


@contextmanager
def locked_output(output: Path, splits: Iterable[str]) -> Iterator[None]:
    """Marks the output as incomplete, and keeps a second process from writing there.

    Raises:
        UserError: it holds a complete split, or another process writes there.
    """
    if not is_incomplete(output):
        for split in (TRAIN, HELDOUT):
            Manifest.refuse_finished(output / split)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / INCOMPLETE, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `megadistill tokenize` is writing to {output}: wait for it") from None
        except OSError:  # a file system without locks
            pass
        for split in splits:
            (output / split).mkdir(exist_ok=True)
        for split in (TRAIN, HELDOUT):
            (output / split / MANIFEST).unlink(missing_ok=True)  # an earlier start ended between two manifests
        yield


def remove_leftovers(output: Path, manifests: Iterable[Manifest]) -> None:
    """Deletes the records for a later start, and shards of earlier starts that are in no manifest."""
    (output / INCOMPLETE).unlink()
    (output / TOKENIZER_FOLDER / RECORD).unlink(missing_ok=True)
    shards = {manifest.split: manifest.shards for manifest in manifests}
    for split in (TRAIN, HELDOUT):
        remove_unlisted(output / split, SHARD_PATTERN, shards.get(split, ()))
