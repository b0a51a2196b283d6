"""Encoding: one run of documents to one shard, and the record by which a later start knows it. It knows no inputs.

The record `.shard-00012.json` is written when its shard is whole, and says from what documents and by what rules. It is
gone when the data set is finished.

Legend: B units at a time, S tokens of a sequence.
"""

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from megadistill.data.prepare.shard_tasks import Run
from megadistill.data.shards.labels import predicted, shift
from megadistill.data.shards.manifest import FORMAT_VERSION, Count, Shard, TokenDtype
from megadistill.data.shards.packing import BESTFIT, CHUNK, PACKER_VERSIONS, Ids, Unit, bestfit, chunk
from megadistill.data.shards.tar import write_shard
from megadistill.data.tokenizers.base import Tokenizer
from megadistill.errors import OperatorFault, UserError
from megadistill.io import file_sha256, written_whole

PackerName = Literal["chunk", "bestfit"]
PACKERS: Final = (CHUNK, BESTFIT)

_TEXT_BYTES_AT_A_TIME = 1 << 20  # a tokenizer's answer is many times as large as the text
_UNITS_AT_A_TIME = 256
_MAX_RECORD_BYTES = 1 << 16
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Rules:
    """What decides, with the documents, the bytes of a shard."""

    packer: PackerName
    packer_version: int
    sequence_length: int
    dtype: TokenDtype
    tokenizer_sha256: str
    bos: int | None
    eos: int
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, packer: PackerName, sequence_length: int, dtype: TokenDtype) -> "Rules":
        return cls(
            packer=packer,
            packer_version=PACKER_VERSIONS[packer],
            sequence_length=sequence_length,
            dtype=dtype,
            tokenizer_sha256=tokenizer.sha256,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Finished(BaseModel):
    """What became of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rules: str
    run: str
    """Digest of its documents."""
    shard: Shard | None
    """None: the documents make no unit."""
    documents: Count
    tokens: Count
    """Tokens that the shard predicts."""
    text_bytes: Count
    """UTF-8 bytes of their text."""
    dropped: Count
    """Tokens that were to be predicted, and are in no unit."""
    padding: Count
    """Tokens of the units that are of no document."""


def record_path(folder: Path, shard: str) -> Path:
    return folder / f".{Path(shard).stem}.json"


def kept(folder: Path, run: Run, rules: Rules) -> Finished | None:
    """The record of an earlier start, where it is of these documents and rules, and its shard is whole on the disk."""
    path = record_path(folder, run.shard)
    try:
        with open(path, "rb") as file:
            record = Finished.model_validate_json(file.read(_MAX_RECORD_BYTES))
        same = record.rules == rules.digest and record.run == run.digest
        return record if same and _is_whole(folder, record.shard) else None
    except (OSError, ValidationError):
        return None


def _is_whole(folder: Path, shard: Shard | None) -> bool:
    return shard is None or (
        (folder / shard.name).stat().st_size == shard.bytes
        and file_sha256(folder / shard.name) == shard.sha256
        and file_sha256(folder / shard.index) == shard.index_sha256
    )


def encode_run(folder: Path, run: Run, rules: Rules, tokenizer: Tokenizer) -> Finished:
    """Writes the shard of a run into `folder`, and then its record.

    Raises:
        OperatorFault: the disk is full.
    """
    count = _Count(tokenizer, rules)
    path = folder / run.shard
    with disk_faults(folder):
        units = count.units(_packed(count.documents(_encoded(run.texts, tokenizer)), rules))
        first = next(units, None)
        shard = None if first is None else write_shard(path, _chained(first, units), dtype=rules.dtype)
        finished = Finished(
            rules=rules.digest,
            run=run.digest,
            shard=shard,
            documents=len(run.texts),
            tokens=count.tokens,
            text_bytes=count.text_bytes,
            dropped=count.to_predict - count.tokens,
            padding=count.padding,
        )
        with written_whole(record_path(folder, run.shard)) as file:
            file.write(finished.model_dump_json().encode())
    return finished


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Says in one line what the operating system has against writing into `folder`.

    Raises:
        OperatorFault: the disk is full or fails.
        UserError: the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        what = f"{error.filename or folder} cannot be written ({error.strerror or error})"
        if error.errno is None or error.errno in _DISK_FAULTS:  # numpy's short write has no number
            raise OperatorFault(
                f"{what}: make room, and start the same command again: it keeps what is whole"
            ) from None
        raise UserError(f"{what}: give an --output that can be written to") from None


def _encoded(texts: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[Ids]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text.decode())
        held += len(text)
        if held >= _TEXT_BYTES_AT_A_TIME:
            yield from tokenizer.encode_batch(batch)
            batch, held = [], 0
    yield from tokenizer.encode_batch(batch)


def _packed(documents: Iterable[Ids], rules: Rules) -> Iterator[Unit]:
    if rules.packer == CHUNK:
        return chunk(documents, sequence_length=rules.sequence_length, bos=rules.bos, eos=rules.eos)
    return bestfit(documents, sequence_length=rules.sequence_length, bos=rules.bos, eos=rules.eos, pad=rules.eos)


def _chained(first: Unit, rest: Iterator[Unit]) -> Iterator[Unit]:
    yield first
    yield from rest


class _Count:
    """What goes into the packer, and what comes out of it."""

    def __init__(self, tokenizer: Tokenizer, rules: Rules) -> None:
        self._piece_bytes = tokenizer.piece_bytes
        self._rules = rules
        self._frame = 1 if rules.bos is None else 2
        self.to_predict = self.tokens = self.text_bytes = self.padding = 0

    def documents(self, documents: Iterable[Ids]) -> Iterator[Ids]:
        """Every token but a document's first one is to be predicted; laid end to end, every one but the very first."""
        across = self._rules.packer == CHUNK
        for number, document in enumerate(documents):
            self.to_predict += len(document) + self._frame - (0 if across and number else 1)
            yield document

    def units(self, units: Iterator[Unit]) -> Iterator[Unit]:
        while batch := list(islice(units, _UNITS_AT_A_TIME)):
            self._add(batch)
            yield from batch

    def _add(self, batch: list[Unit]) -> None:
        sequence = self._rules.sequence_length
        bounds = [unit.bounds for unit in batch]
        _, labels_BS = shift(np.stack([unit.tokens for unit in batch]))
        inside_BS = predicted(bounds, sequence_length=sequence, across_documents=self._rules.packer == CHUNK)
        self.tokens += int(inside_BS.sum())
        self.text_bytes += int(self._piece_bytes[labels_BS][inside_BS].sum())
        self.padding += sum(sequence + 1 - int(row[-1]) for row in bounds)
