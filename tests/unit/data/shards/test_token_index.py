"""The index of a token file is untrusted: what makes no sense is a fault in one line, and no read leaves the file."""

import dataclasses
import hashlib
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megadistill.data.shards.manifest import (
    Manifest,
    PackerRecord,
    SourceRecord,
    TokenFileFormat,
    TokenizerRecord,
)
from megadistill.data.shards.opening import ShardFault
from megadistill.data.shards.reader import SequenceReader, open_shard
from megadistill.data.shards.shard import Shard
from megadistill.data.shards.shard_cache import ShardCache
from megadistill.data.shards.shard_table import ShardTable
from megadistill.data.shards.token_files.token_index import HEADER_BYTES, TokenIndex, index_of
from megadistill.data.storage.local import SETTLED_NS, LocalFolder

S = 5
VOCAB = 90
IDS = np.random.default_rng(0).integers(0, VOCAB, 43).astype("<u2")
SEQUENCES = 8
SEGMENTS = [(30, 9), (0, 15), (48, 19)]
"""Begin in bytes and number of ids: the file has them in another order, and bytes between them that are no ids."""
STARTS = [0, 4, 5, 6, 20, 40]


def _file_bytes() -> bytes:
    content, place = bytearray(b"\xff" * 100), 0
    for begin, count in SEGMENTS:
        content[begin : begin + 2 * count] = IDS[place : place + count].tobytes()
        place += count
    return bytes(content)


def _whole_index() -> TokenIndex:
    crc32 = [zlib.crc32(IDS[n * S : n * S + S + 1].tobytes()) for n in range(SEQUENCES)]
    return TokenIndex.of_segments(np.array(SEGMENTS), np.array(crc32), np.array(STARTS))


def _manifest(folder: Path, change: Callable[[bytearray], bytes | bytearray | None] = lambda content: None) -> Manifest:
    """A split of one file, whose manifest vouches for the changed index."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "ids.bin").write_bytes(_file_bytes())
    index = folder / "ids.bin.idx.npy"
    _whole_index().write(index)
    content = bytearray(index.read_bytes())
    index.write_bytes(change(content) or content)
    shard = Shard(
        name="ids.bin",
        sequences=SEQUENCES,
        bytes=100,
        sha256=hashlib.sha256(_file_bytes()).hexdigest(),
        index_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
    )
    return Manifest(
        version=3,
        split="train",
        sequence_length=S,
        dtype="uint16",
        vocab_size=VOCAB,
        sample_format=TokenFileFormat(
            kind="token_file", format="raw", folder="data", dtype="uint16", has_documents=True, segments=3
        ),
        tokenizer=TokenizerRecord(kind="sentencepiece", file="tokenizer.model", sha256="0" * 64),
        packer=PackerRecord(name="external", version=1, bos=None, eos=None),
        documents=len(STARTS),
        tokens=SEQUENCES * S,
        text_bytes=None,
        source=SourceRecord(inputs=("random",)),
        shards=ShardTable.of((shard,)),
    ).lying_in(LocalFolder(folder))


def _places(sequences: list[int]) -> np.ndarray:
    return np.array([(0, sequence) for sequence in sequences])


def test_sequences_over_several_segments_are_read_in_any_order(tmp_path: Path) -> None:
    order = [7, 0, 3, 3, 1, 2, 6, 5, 4]
    batch = SequenceReader(_manifest(tmp_path)).read(_places(order))
    assert not batch.faults
    for row, sequence in enumerate(order):
        first = sequence * S
        np.testing.assert_array_equal(batch.tokens[row], IDS[first : first + S + 1])
        assert batch.bounds[row].tolist() == [0, *(p - first for p in STARTS if first < p <= first + S), S + 1]


def _values(at: int, value: int) -> Callable[[bytearray], None]:
    """Changes number `at` of the row."""

    def change(content: bytearray) -> None:
        content[HEADER_BYTES + 8 * at : HEADER_BYTES + 8 * at + 8] = value.to_bytes(8, "little", signed=True)

    return change


BEGINS, ENDS, CRC32, DOCUMENTS = 2, 5, 8, 16


def _overflowing(content: bytearray) -> None:
    """Starts of documents that fall so far that their differences are positive in 64 bits."""
    _values(DOCUMENTS + 2, -(1 << 63))(content)
    _values(DOCUMENTS + 3, -1)(content)


IMPOSSIBLE: dict[str, tuple[Callable[[bytearray], bytes | bytearray | None], str]] = {
    "another file": (lambda content: b"PK" + content[2:], "expected an .npy of one row of int64"),
    "another dtype": (lambda content: content.replace(b"<i8", b"<f8"), "expected an .npy of one row of int64"),
    "cut off": (lambda content: content[:-8], "expected an .npy of one row of int64"),
    "longer than the manifest allows": (lambda content: content + bytes(8), "bytes at most, found"),
    "no segments": (_values(0, 0), "found the counts of 0 segments"),
    "more segments": (_values(0, 4), "found the counts of 4 segments"),
    "less than no documents": (_values(1, -6), "documents"),
    "a segment before the file": (_values(BEGINS, -2), "segment 0: expected a range that ends before byte 100"),
    "a segment past the end": (_values(BEGINS + 2, 64), "segment 2: expected a range that ends before byte 100"),
    "a segment far past the end": (_values(BEGINS, (1 << 63) - 1), "segment 0: expected a range that ends before"),
    "ends that fall": (_values(ENDS + 1, 8), "segment 1: expected places that climb"),
    "an end far away": (_values(ENDS + 2, (1 << 63) - 1), "segment 2: expected places that climb"),
    "fewer ids than sequences": (_values(ENDS + 2, 40), f"expected {SEQUENCES} sequences of {S + 1} ids, found 40 ids"),
    "more ids than sequences": (_values(ENDS + 2, 46), f"expected {SEQUENCES} sequences of {S + 1} ids, found 46 ids"),
    "no crc32": (_values(CRC32 + 3, 1 << 32), "sequence 3: expected a crc32"),
    "a negative crc32": (_values(CRC32, -1), "sequence 0: expected a crc32"),
    "documents that fall": (_values(DOCUMENTS + 2, 4), "document 2: expected places that climb"),
    "documents that fall by more than 64 bits": (_overflowing, "document 2: expected places that climb"),
    "a document before the beginning": (_values(DOCUMENTS, -1), "document 0: expected places that climb"),
    "a document past the end": (_values(DOCUMENTS + 5, 43), "document 5: expected places that climb, below 43"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_index_is_a_fault_in_one_line(case: str, tmp_path: Path) -> None:
    change, message = IMPOSSIBLE[case]
    manifest = _manifest(tmp_path, change)
    with pytest.raises(ShardFault) as fault:
        open_shard(manifest, 0)
    assert message in str(fault.value)
    assert str(fault.value).startswith(f"{tmp_path}/ids.bin.idx.npy: ")
    assert "\n" not in str(fault.value)
    faults = SequenceReader(manifest).read(_places([2, 5])).faults
    assert {row: str(each) for row, each in faults.items()} == dict.fromkeys((0, 1), str(fault.value))


def test_another_index_or_none_is_a_fault(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    path = tmp_path / "ids.bin.idx.npy"
    _values(CRC32, 5)(content := bytearray(path.read_bytes()))
    path.write_bytes(content)
    with pytest.raises(ShardFault, match="expected the index with sha256"):
        open_shard(manifest, 0)
    path.unlink()
    with pytest.raises(ShardFault, match=r"expected the index of ids\.bin, found: No such file"):
        open_shard(manifest, 0)


def test_random_numbers_in_an_index_are_faults_and_never_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    numbers, refused = DOCUMENTS + len(STARTS), 0
    for _ in range(60):
        at, value = int(random.integers(0, numbers)), int(random.choice([0, 1, 7, 41, -1, 1 << 31, 1 << 62, 1 << 40]))
        manifest = _manifest(tmp_path, _values(at, value))
        batch = SequenceReader(manifest).read(_places(list(range(SEQUENCES))))
        for row in range(SEQUENCES):
            if row in batch.faults:
                assert "\n" not in str(batch.faults[row])
                refused += 1
            else:
                np.testing.assert_array_equal(batch.tokens[row], IDS[row * S : row * S + S + 1])
    assert refused > 120


def test_an_index_is_verified_once_while_its_file_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where many files drive it out of what is kept open; a file that is written again is verified again."""
    manifest = _manifest(tmp_path)

    def counted(*arguments: object, verified: bool) -> TokenIndex:
        seen.append(verified)
        return index_of(*arguments, verified=verified)  # type: ignore[arg-type]

    seen: list[bool] = []
    monkeypatch.setattr("megadistill.data.shards.token_files.token_file_reader.index_of", counted)
    monkeypatch.setattr("megadistill.data.storage.local.SETTLED_NS", -SETTLED_NS * 1000)
    cache = ShardCache()
    monkeypatch.setattr(cache.token_files, "get", lambda key: None)
    reader = SequenceReader(manifest, cache)
    for _ in range(3):
        assert not reader.read(_places([1])).faults
    os.utime(tmp_path / "ids.bin.idx.npy", (1, 1))
    assert not reader.read(_places([1])).faults
    assert seen == [False, True, True, False]


def test_an_index_is_an_npy_that_gives_back_what_was_written(tmp_path: Path) -> None:
    whole = _whole_index()
    whole.write(tmp_path / "a.npy")
    read = TokenIndex.parse(memoryview((tmp_path / "a.npy").read_bytes()), SEQUENCES)
    for field in dataclasses.fields(TokenIndex):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(whole, field.name))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy")[:2], [3, len(STARTS)])


def test_checking_an_index_takes_a_part_of_its_memory() -> None:
    """Each rank checks it; 10^9 documents at once would be some times 8 GB in each."""
    many = np.arange(1 << 20)
    index = TokenIndex(2 * many, many + 1, np.zeros((len(many) - 1) // S, dtype=np.int64), many)
    tracemalloc.start()
    try:
        index.require_sound(sequence_length=S, file_bytes=2 * len(many), itemsize=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < many.nbytes
    for column, number in (("crc32_Q", 200_000), ("starts_D", 900_000)):
        values = getattr(index, column).copy()
        values[number] = -1
        with pytest.raises(ValueError, match=rf"^(sequence|document) {number}: expected .*, found -1$"):
            dataclasses.replace(index, **{column: values}).require_sound(
                sequence_length=S, file_bytes=2 * len(many), itemsize=2
            )
