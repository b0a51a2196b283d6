"""Runs: the documents of each split, cut into pieces of work. It knows no tokenizer and no processes.

Where a run ends depends on the text and on `run_bytes` alone. A run becomes one shard, so the bytes of the shards do
not depend on who writes them, nor on how often the work was broken off.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from megadistill.data.prepare.corpus import Corpus, Document

TRAIN: Final = "train"
HELDOUT: Final = "heldout"
SHARD_PREFIX: Final = "shard-"


@dataclass(frozen=True)
class Run:
    """Documents that become one shard."""

    split: str
    number: int
    texts: tuple[bytes, ...]
    digest: str
    """Of the documents, in hexadecimal."""
    file_bytes: int
    """Of the files, read since the run that was cut before this one: what its work is worth as progress."""

    @property
    def shard(self) -> str:
        return f"{SHARD_PREFIX}{self.number:05d}.tar"


def split_of(document: Document, heldout_fraction: float) -> str:
    """By the text, so that copies lie on one side."""
    return HELDOUT if int.from_bytes(document.digest, "big") < heldout_fraction * 2**64 else TRAIN


def cut(corpus: Corpus, *, heldout_fraction: float, run_bytes: int) -> Iterator[Run]:
    """The runs of both splits as they fill up: a run ends with the document that brings it to `run_bytes` of text.

    Two runs are held at most, of `run_bytes` and a document each.
    """
    open_runs = {TRAIN: _OpenRun(TRAIN), HELDOUT: _OpenRun(HELDOUT)}
    told = 0
    for document in corpus:
        split = split_of(document, heldout_fraction)
        run = open_runs[split]
        run.add(document)
        if run.text_bytes >= run_bytes:
            yield run.closed(corpus.bytes_read - told)
            told = corpus.bytes_read
            open_runs[split] = _OpenRun(split, run.number + 1)
    for run in open_runs.values():
        if run.texts:
            yield run.closed(corpus.bytes_read - told)
            told = corpus.bytes_read


class _OpenRun:
    def __init__(self, split: str, number: int = 0) -> None:
        self.split, self.number = split, number
        self.text_bytes = 0
        self.texts: list[bytes] = []
        self._digest = hashlib.sha256()

    def add(self, document: Document) -> None:
        self.texts.append(document.data)
        self.text_bytes += len(document.data)
        self._digest.update(document.digest)

    def closed(self, file_bytes: int) -> Run:
        return Run(self.split, self.number, tuple(self.texts), self._digest.hexdigest(), file_bytes)
