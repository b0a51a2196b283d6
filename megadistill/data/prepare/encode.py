"""Encoding a task: its documents to one shard, and the shard's record.

Legend: B sequences at a time, S tokens of a sequence.
"""

import errno
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from megadistill.data.prepare.shard_tasks import ShardTask
from megadistill.data.shards.labels import predicted, shift
from megadistill.data.shards.manifest import FORMAT_VERSION, Count, PackerRecord, TokenDtype, token_dtype
from megadistill.data.shards.packing import CHUNK, PACKER_VERSIONS, Ids, PackedSequence, bestfit, chunk
from megadistill.data.shards.shard_record import ShardRecord
from megadistill.data.shards.tar import write_shard
from megadistill.data.tokenizers.tokenizer import Tokenizer
from megadistill.errors import OperatorFault, UserError

PackerName = Literal["chunk", "bestfit"]

_TEXT_BYTES_AT_A_TIME = 1 << 20  # a tokenizer's result is many times as large as the text
_SEQUENCES_AT_A_TIME = 256
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class EncodingSpec(BaseModel):
    """The settings that decide, with the documents, the bytes of a shard."""

    packer: PackerRecord
    sequence_length: int
    dtype: TokenDtype
    tokenizer_sha256: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, *, packer: PackerName, sequence_length: int, insert_bos: bool = True
    ) -> "EncodingSpec":
        """`insert_bos`: sequences begin with BOS, where the tokenizer puts one before a text."""
        record = PackerRecord(
            name=packer,
            version=PACKER_VERSIONS[packer],
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            sequence_bos=insert_bos and tokenizer.bos is not None,
        )
        return cls(
            packer=record,
            sequence_length=sequence_length,
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_sha256=tokenizer.sha256,
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class EncodedShard(ShardRecord):
    """The result of a task."""

    encoding: str
    """Digest of the EncodingSpec."""
    task: str
    """Digest of the task's documents."""
    largest_id: Count
    """0 where there is no shard."""
    dropped: Count
    """Tokens to predict that are in no sequence."""
    padding: Count
    """Tokens of the sequences that belong to no document."""


def reusable_shard(output: Path, task: ShardTask, spec: EncodingSpec) -> EncodedShard | None:
    """The result of an earlier start, if it has the same documents and encoding, and its shard is whole on disk."""
    return EncodedShard.load(output / task.path, encoding=spec.digest, task=task.digest)


def encode_task(output: Path, task: ShardTask, spec: EncodingSpec, tokenizer: Tokenizer) -> EncodedShard:
    """Writes the shard of a task below `output`, and then its record.

    Raises:
        OperatorFault: the disk is full.
    """
    counter, path = _TokenCounter(tokenizer, spec), output / task.path
    with disk_faults(path.parent):
        sequences = counter.sequences(_packed(counter.documents(_encoded(task.texts, tokenizer)), spec))
        first = next(sequences, None)
        shard = None if first is None else write_shard(path, chain([first], sequences), dtype=spec.dtype)
        result = EncodedShard(
            encoding=spec.digest,
            task=task.digest,
            shard=shard,
            documents=len(task.texts),
            tokens=counter.tokens,
            text_bytes=counter.text_bytes,
            dropped=counter.dropped,
            largest_id=counter.largest_id,
            padding=counter.padding,
        )
        result.write(path)
    return result


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turns an OSError of a write into `folder` into one line.

    Raises:
        OperatorFault: the disk is full or fails.
        UserError: the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        message = f"{error.filename or folder} cannot be written ({error.strerror or error})"
        if error.errno is None or error.errno in _DISK_FAULTS:  # numpy's short write has no number
            raise OperatorFault(
                f"{message}: free some space, and start the same command again: whole shards are reused"
            ) from None
        raise UserError(f"{message}: give an --output that can be written to") from None


def _encoded(texts: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[Ids]:
    batch: list[str] = []
    batch_bytes = 0
    for text in texts:
        batch.append(text.decode())
        batch_bytes += len(text)
        if batch_bytes >= _TEXT_BYTES_AT_A_TIME:
            yield from tokenizer.encode_batch(batch)
            batch, batch_bytes = [], 0
    yield from tokenizer.encode_batch(batch)


def _packed(documents: Iterable[Ids], spec: EncodingSpec) -> Iterator[PackedSequence]:
    length, bos, eos, insert_bos = spec.sequence_length, spec.packer.bos, spec.packer.eos, spec.packer.sequence_bos
    assert eos is not None
    if spec.packer.name == CHUNK:
        return chunk(documents, sequence_length=length, bos=bos, eos=eos, insert_bos=insert_bos)
    return bestfit(documents, sequence_length=length, bos=bos, eos=eos, pad=eos, insert_bos=insert_bos)


class _TokenCounter:
    """Counts of the documents that go into the packer, and of the sequences that come out of it."""

    def __init__(self, tokenizer: Tokenizer, spec: EncodingSpec) -> None:
        self._piece_bytes = tokenizer.piece_bytes
        self._spec = spec
        self._across = spec.packer.across_documents
        self._frame = 1 if spec.packer.bos is None else 2
        self._to_predict = self._predicted = self.tokens = self.text_bytes = self.padding = self.largest_id = 0

    @property
    def dropped(self) -> int:
        """Tokens to predict that are in no sequence; without BOS, where a BOS is in front of each sequence."""
        return self._to_predict - self._predicted

    def documents(self, documents: Iterable[Ids]) -> Iterator[Ids]:
        """Every token but a document's first one is to be predicted; laid end to end, every one but the very first."""
        for number, document in enumerate(documents):
            first = self._spec.packer.sequence_bos or not self._across or number == 0
            self._to_predict += len(document) + self._frame - (1 if first else 0)
            yield document

    def sequences(self, sequences: Iterator[PackedSequence]) -> Iterator[PackedSequence]:
        length, in_front = self._spec.sequence_length, self._spec.packer.sequence_bos
        while batch := list(islice(sequences, _SEQUENCES_AT_A_TIME)):
            bounds = [sequence.bounds for sequence in batch]
            tokens_BT = np.stack([sequence.tokens for sequence in batch])
            self.largest_id = max(self.largest_id, int(tokens_BT.max()))
            _, labels_BS = shift(tokens_BT)
            predicted_BS = predicted(bounds, sequence_length=length, across_documents=self._across)
            tokens = int(predicted_BS.sum())
            self.tokens += tokens
            # Counted by place: the tokenizer's EOS may be the same id.
            begins = sum(len(row) - 2 for row in bounds) if in_front and self._across else 0
            self._predicted += tokens - begins
            self.text_bytes += int(self._piece_bytes[labels_BS][predicted_BS].sum())
            self.padding += sum(length + 1 - int(row[-1]) for row in bounds)
            yield from batch
