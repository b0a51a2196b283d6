"""Megatron's files, written byte by byte as Megatron-LM, DeepSpeed and fairseq do."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MEGATRON: Final = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
DEEPSPEED: Final = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 6, "uint32": 7, "uint64": 8}

Ids = NDArray[Any]


def random_documents(count: int, *, vocab: int, seed: int = 0) -> list[list[Ids]]:
    """Documents of one to three sentences, some of them empty."""
    random = np.random.default_rng(seed)
    return [
        [random.integers(0, vocab, int(random.integers(0, 30))) for _ in range(int(random.integers(1, 4)))]
        for _ in range(count)
    ]


def flat(documents: Sequence[Sequence[Ids]]) -> Ids:
    """All ids in their order."""
    return np.concatenate([sentence for document in documents for sentence in document])


def starts_of(documents: Sequence[Sequence[Ids]]) -> list[int]:
    """Places where documents begin that are not empty."""
    lengths = [sum(map(len, document)) for document in documents]
    places = np.concatenate(([0], np.cumsum(lengths)))
    return sorted({int(place) for place, length in zip(places, lengths, strict=False) if length})


def write_new(
    prefix: Path,
    documents: Sequence[Sequence[Ids]],
    dtype: str,
    *,
    codes: dict[str, int] = MEGATRON,
    modes: Sequence[int] | None = None,
) -> Path:
    """MMIDIDX: the index of Megatron-core, of DeepSpeed and of Megatron-LM since 2019."""
    sentences = [sentence.astype(dtype) for document in documents for sentence in document]
    prefix.with_name(prefix.name + ".bin").write_bytes(
        b"".join(one.astype(f"<{one.dtype.str[1:]}").tobytes() for one in sentences)
    )
    lengths = [len(sentence) for sentence in sentences]
    pointers = np.concatenate(([0], np.cumsum(lengths)[:-1])) * np.dtype(dtype).itemsize
    bounds = np.concatenate(([0], np.cumsum([len(document) for document in documents])))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, codes[dtype], len(lengths), len(bounds))
    body = np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes() + bounds.astype("<i8").tobytes()
    last = b"" if modes is None else np.array(modes, "<i1").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(head + body + last)
    return prefix


def write_old(
    prefix: Path, documents: Sequence[Sequence[Ids]], dtype: str, *, code: int, with_documents: bool = True
) -> Path:
    """TNTIDX: the index of the first Megatron-LM; without documents that of fairseq, whose items are documents."""
    sentences = [sentence.astype(dtype) for document in documents for sentence in document]
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(one.tobytes() for one in sentences))
    lengths = [len(sentence) for sentence in sentences]
    bounds = np.concatenate(([0], np.cumsum([len(document) for document in documents])))
    head = b"TNTIDX\x00\x00" + struct.pack("<QQQQQ", 1, code, np.dtype(dtype).itemsize, len(lengths), len(lengths))
    columns = [np.arange(len(lengths) + 1), np.concatenate(([0], np.cumsum(lengths))), np.array(lengths)]
    if with_documents:
        head += struct.pack("<Q", len(bounds))
        columns.append(bounds)
    prefix.with_name(prefix.name + ".idx").write_bytes(
        head + b"".join(each.astype("<i8").tobytes() for each in columns)
    )
    return prefix
