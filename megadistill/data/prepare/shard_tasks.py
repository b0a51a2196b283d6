"""Cutting the documents of each split into shard tasks.

The end of a task depends on the text and on `task_bytes` alone. A task becomes one shard, so the bytes of the shards
depend neither on the process that writes them nor on restarts.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megadistill.data.text.corpus import PARQUET, Corpus, Document

TRAIN: Final = "train"
HELDOUT: Final = "heldout"
SHARD_PREFIX: Final = "shard-"
SHARD_PATTERN: Final = f"{SHARD_PREFIX}[0-9]*"

SHARD_MB: Final = (32, 64, 128, 256, 512)
"""Sizes of a shard in 10^6 bytes of text, from which one is chosen by the corpus. The order of a stream mixes sequences
whatever the shards: many of them only let more processes encode. A process holds the text of two."""
ENOUGH_SHARDS: Final = 20_000
MANY_SHARDS: Final = 200_000
"""Shards from which on a file system has trouble with their files, two a shard."""
EXPANSION: Final = 3
"""Bytes of text in a byte of a compressed file, roughly."""
COMPRESSED: Final = (".gz", ".zst", PARQUET)


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


def text_bytes_of(paths: Iterable[Path]) -> int:
    """Bytes of the text in files, estimated from their sizes."""
    return sum(path.stat().st_size * (EXPANSION if path.suffix in COMPRESSED else 1) for path in paths)


def shard_mb_for(text_bytes: int) -> int:
    """The least size of SHARD_MB that makes at most ENOUGH_SHARDS of a text; the largest, where none does."""
    return next((size for size in SHARD_MB if text_bytes <= size * 1e6 * ENOUGH_SHARDS), SHARD_MB[-1])


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
