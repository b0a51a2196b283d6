"""Splits of random sequences, written as a data set is, and what each slot of their stream must read."""

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Literal

import numpy as np

from megadistill.data.shards.manifest import (
    Manifest,
    PackerRecord,
    SampleFormat,
    SourceRecord,
    TokenizerRecord,
    token_dtype,
)
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.shard_table import ShardTable
from megadistill.data.shards.tar import write_shard

SEQUENCE = 24
VOCAB = 500


class Column(IntEnum):
    """Columns of the index [Q, 7] of a shard of sequences."""

    START = 0
    LENGTH = 1
    CRC32 = 2
    TOKENS_AT = 3
    TOKENS_BYTES = 4
    BOUNDS_AT = 5
    BOUNDS_BYTES = 6


def random_sequences(
    count: int, *, seed: int, sequence: int = SEQUENCE, vocab: int = VOCAB, full: bool = True
) -> list[PackedSequence]:
    """Sequences with documents of random lengths; with padding behind the last one if not `full`."""
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        end = sequence + 1 if full else int(random.integers(2, sequence + 2))
        inner = random.integers(1, end, size=int(random.integers(0, 4)))
        bounds = np.unique(np.array([0, *inner, end], dtype=np.int32))
        sequences.append(PackedSequence(random.integers(0, vocab, sequence + 1).astype(np.int32), bounds))
    return sequences


def write_split(
    folder: Path,
    sequences: Sequence[PackedSequence],
    *,
    per_shard: int = 40,
    vocab: int = VOCAB,
    packer: Literal["chunk", "bestfit", "external"] = "chunk",
    tokenizer_sha256: str = "0" * 64,
    text_bytes: int | None = 1000,
    bos: int | None = None,
    sequence_bos: bool = False,
) -> Manifest:
    """The manifest of `sequences`, as it is loaded from `folder`, where the tokenizer's file is a made-up one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"made up")
    dtype = token_dtype(vocab)
    shards = tuple(
        write_shard(folder / f"shard-{start // per_shard:05d}.tar", sequences[start : start + per_shard], dtype=dtype)
        for start in range(0, len(sequences), per_shard)
    )
    sequence = len(sequences[0].tokens) - 1
    tokens = sum(
        sequence if packer == "chunk" else int(packed.bounds[-1]) - len(packed.bounds) + 1 for packed in sequences
    )
    Manifest(
        version=3,
        split="train",
        sequence_length=sequence,
        dtype=dtype,
        vocab_size=vocab,
        sample_format=SampleFormat(kind="npy", tokens="tokens.npy", bounds="bounds.npy"),
        tokenizer=TokenizerRecord(kind="sentencepiece", file="tokenizer.model", sha256=tokenizer_sha256),
        packer=PackerRecord(name=packer, version=1, bos=bos, eos=2, sequence_bos=sequence_bos),
        documents=len(sequences),
        tokens=tokens,
        text_bytes=text_bytes,
        source=SourceRecord(inputs=("random",)),
        shards=ShardTable.of(shards),
    ).write(folder)
    return Manifest.load(folder / "manifest.json")
