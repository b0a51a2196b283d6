"""Training a tokenizer on a sample of a corpus, once for the same sample."""

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from megadistill.data.text.corpus import Document
from megadistill.data.tokenizers.folder_files import MODEL_FILE
from megadistill.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer
from megadistill.errors import UserError
from megadistill.io import read_json, write_file

SAMPLE_BYTES: Final = 10_000_000
"""Most bytes of text in a sample: whole documents, and the lines of one more."""

RECORD: Final = ".training.json"


class TrainingSample:
    """The documents with the smallest digests: a random choice, always the same one, in memory that does not grow."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Document]] = []  # the largest digest first; of copies, the last one
        self._added = 0
        self.bytes = 0

    def add(self, document: Document) -> None:
        self._added += 1
        heapq.heappush(self._heap, (-int.from_bytes(document.digest, "big"), -self._added, document))
        self.bytes += _size(document)
        while self.bytes - _size(self._heap[0][2]) >= SAMPLE_BYTES:
            self.bytes -= _size(heapq.heappop(self._heap)[2])

    def lines(self) -> Iterator[str]:
        """Lines of the documents in the order of their digests, until they hold SAMPLE_BYTES."""
        left = SAMPLE_BYTES
        for document in self._documents():
            for line in document.text.split("\n"):
                if left <= 0:
                    return
                left -= len(line.encode()) + 1
                yield line

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(document.digest for document in self._documents())).hexdigest()

    def _documents(self) -> list[Document]:
        return [document for _, _, document in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def _size(document: Document) -> int:
    return len(document.data) + 1


def trained_tokenizer(sample: TrainingSample, folder: Path, *, vocab_size: int) -> SentencePieceTokenizer:
    """The tokenizer of `vocab_size` pieces for a sample, trained and written into `folder` with its record.

    It is not trained again where the record in `folder` is of the same sample.
    """
    inputs: dict[str, str | int] = {"vocab_size": vocab_size, "sample": sample.digest}
    earlier = _earlier(folder, inputs)
    if earlier is not None:
        return earlier
    tokenizer = train_tokenizer(sample.lines(), vocab_size=vocab_size)
    tokenizer.write(folder)
    write_file(folder / RECORD, json.dumps({**inputs, "sha256": tokenizer.sha256}).encode())
    return tokenizer


def _earlier(folder: Path, inputs: dict[str, str | int]) -> SentencePieceTokenizer | None:
    try:
        record = read_json(folder / RECORD)
        tokenizer = SentencePieceTokenizer.load(folder / MODEL_FILE)
    except (OSError, ValueError, UserError):
        return None
    return tokenizer if record == {**inputs, "sha256": tokenizer.sha256} else None
