"""Cutting the documents of each split into shard tasks.

The end of a task depends on the text and on `task_bytes` alone. A task becomes one shard, so the bytes of the shards
depend neither on the process that writes them nor on restarts.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megadistill.data.prepare.corpus import Corpus, Document

TRAIN: Final = "train"
HELDOUT: Final = "heldout"
SHARD_PREFIX: Final = "shard-"
SHARD_PATTERN: Final = f"{SHARD_PREFIX}[0-9]*"


@dataclass(frozen=True)
class ShardTask:
    """The documents of one shard."""

    split: str
    number: int
    texts: tuple[bytes, ...]
    digest: str
    """Hash of the documents, in hexadecimal."""
    file_bytes: int
    """Bytes of the files read since the task before this one: the progress that it counts for."""

    @property
    def path(self) -> Path:
        """Path of the shard in the output folder."""
        return Path(self.split, f"{SHARD_PREFIX}{self.number:05d}.tar")


def split_of(document: Document, heldout_fraction: float) -> str:
    """The split of a document, by its text, so that copies lie on one side."""
    return HELDOUT if int.from_bytes(document.digest, "big") < heldout_fraction * 2**64 else TRAIN


def cut_into_tasks(corpus: Corpus, *, heldout_fraction: float, task_bytes: int) -> Iterator[ShardTask]:
    """The tasks of both splits as they fill up: a task ends with the document that brings it to `task_bytes` of text.

    Two tasks are held at most, of `task_bytes` and a document each.
    """
    open_tasks = {TRAIN: _OpenTask(TRAIN), HELDOUT: _OpenTask(HELDOUT)}
    counted = 0
    for document in corpus:
        split = split_of(document, heldout_fraction)
        task = open_tasks[split]
        task.add(document)
        if task.text_bytes >= task_bytes:
            yield task.closed(corpus.bytes_read - counted)
            counted = corpus.bytes_read
            open_tasks[split] = _OpenTask(split, task.number + 1)
    for task in open_tasks.values():
        if task.texts:
            yield task.closed(corpus.bytes_read - counted)
            counted = corpus.bytes_read


class _OpenTask:
    def __init__(self, split: str, number: int = 0) -> None:
        self.split, self.number = split, number
        self.text_bytes = 0
        self.texts: list[bytes] = []
        self._digest = hashlib.sha256()

    def add(self, document: Document) -> None:
        self.texts.append(document.data)
        self.text_bytes += len(document.data)
        self._digest.update(document.digest)

    def closed(self, file_bytes: int) -> ShardTask:
        return ShardTask(self.split, self.number, tuple(self.texts), self._digest.hexdigest(), file_bytes)
