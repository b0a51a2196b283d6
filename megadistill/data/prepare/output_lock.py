"""An output that is not finished: who may write there, and what is deleted when it is done. It knows no text."""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from megadistill.data.prepare.shard_tasks import HELDOUT, SHARD_PREFIX, TRAIN
from megadistill.data.prepare.tokenizer_training import RECORD
from megadistill.data.shards.manifest import MANIFEST, Manifest, refuse_finished
from megadistill.errors import UserError

TOKENIZER_FOLDER: Final = "tokenizer"
UNFINISHED: Final = ".unfinished"
"""Lies in the output from the first moment to the last, and is locked while somebody writes there."""


@contextmanager
def unfinished(output: Path, splits: Iterable[str]) -> Iterator[None]:
    """Marks the output as unfinished, and keeps a second process from writing there.

    Raises:
        UserError: it holds a finished split, or somebody writes there.
    """
    if not (output / UNFINISHED).exists():
        for split in (TRAIN, HELDOUT):
            refuse_finished(output / split)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / UNFINISHED, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `megadistill tokenize` is writing to {output}: wait for it") from None
        except OSError:  # a file system without locks
            pass
        for split in splits:
            (output / split).mkdir(exist_ok=True)
        for split in (TRAIN, HELDOUT):
            (output / split / MANIFEST).unlink(missing_ok=True)  # broken off between two manifests
        yield


def clear(output: Path, manifests: Iterable[Manifest]) -> None:
    """Deletes what a later start would have needed, and shards of an earlier start that are of no use any more."""
    (output / UNFINISHED).unlink()
    (output / TOKENIZER_FOLDER / RECORD).unlink(missing_ok=True)
    listed = {
        output / one.split / name for one in manifests for shard in one.shards for name in (shard.name, shard.index)
    }
    for split in (TRAIN, HELDOUT):
        for record in list((output / split).glob(f".{SHARD_PREFIX}*")):
            shard = record.name[1:].partition(".")[0]
            for path in {record, *record.parent.glob(f"{shard}.tar*")} - listed:
                path.unlink()
