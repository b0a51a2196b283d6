"""Sequences as they were written, and every fault reported in its own row, with no other row touched."""

import dataclasses
import io
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset import TarWriter

from megadistill.data.shards import shard_cache
from megadistill.data.shards.manifest import Manifest, SampleFormat
from megadistill.data.shards.opening import ShardFault
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.shards.sequence_batch import SequenceBatch
from megadistill.data.shards.tar import index_sequences, write_index, write_shard
from megadistill.data.storage.remote import BLOCK_BYTES, RemoteFolder, RetryPolicy
from megadistill.errors import OperatorFault
from tests.unit.data import servers
from tests.unit.data.servers import serving
from tests.unit.data.splits import SEQUENCE, VOCAB, Column, random_sequences, write_split

PER_SHARD, SHARDS = 10, 4
LENGTH = SEQUENCE + 1
SEQUENCES = random_sequences(PER_SHARD * SHARDS, seed=7, full=False)
EVERY = np.array([(shard, sequence) for shard in range(SHARDS) for sequence in range(PER_SHARD)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "train"
    write_split(folder, SEQUENCES, per_shard=PER_SHARD, packer="bestfit")
    return folder


@pytest.fixture
def split(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(whole, tmp_path / "train"))


def _manifest(split: Path) -> Manifest:
    return Manifest.load(split / "manifest.json")


def _read(split: Path, places: Any = EVERY) -> SequenceBatch:
    return SequenceReader(_manifest(split)).read(np.array(places))


def _check(
    sequences: SequenceBatch, *, faults: dict[int, str], places: Any = EVERY, written: list[PackedSequence] = SEQUENCES
) -> None:
    """Exactly these rows are faults, each with its message; every other row is the sequence that was written."""
    assert sequences.faults.keys() == faults.keys()
    assert sequences.tokens.shape == (len(places), LENGTH)
    for row, (shard, sequence) in enumerate(places):
        expected = written[shard * PER_SHARD + sequence]
        if row in faults:
            assert not sequences.tokens[row].any()
            assert sequences.bounds[row].tolist() == [0, LENGTH]
            fault = sequences.faults[row]
            assert isinstance(fault, OperatorFault)
            assert faults[row] in str(fault)
            assert "\n" not in str(fault)
        else:
            np.testing.assert_array_equal(sequences.tokens[row], expected.tokens)
            np.testing.assert_array_equal(sequences.bounds[row], expected.bounds)


def _rows(shard: int, message: str) -> dict[int, str]:
    return {shard * PER_SHARD + sequence: message for sequence in range(PER_SHARD)}


def _paths(split: Path, shard: int) -> tuple[Path, Path]:
    record = _manifest(split).shards[shard]
    return split / record.name, split / record.index


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def _publish(split: Path, shard: int, rows: np.ndarray | None = None) -> None:
    """Makes index and manifest agree with the tar as it now is: only its content is wrong."""
    manifest = _manifest(split)
    tar, _ = _paths(split, shard)
    assert isinstance(manifest.sample_format, SampleFormat)
    record = write_index(tar, index_sequences(tar, manifest.sample_format) if rows is None else rows)
    record = dataclasses.replace(record, sequences=manifest.shards[shard].sequences)
    shards = (*manifest.shards[:shard], record, *manifest.shards[shard + 1 :])
    (split / "manifest.json").unlink()
    _changed(manifest, shards=shards).write(split)


def _changed(manifest: Manifest, **changes: Any) -> Manifest:
    return Manifest(**{name: getattr(manifest, name) for name in Manifest.model_fields} | changes)


def _rewrite(split: Path, sequence: int, **members: bytes) -> None:
    """Shard 1 with other bytes in the members `tokens` or `bounds` of a sequence; index and manifest are right."""
    tar_path, _ = _paths(split, 1)
    with open(tar_path, "wb") as file, TarWriter(file, mtime=0) as tar:
        for number, written in enumerate(SEQUENCES[PER_SHARD : 2 * PER_SHARD]):
            sample: dict[str, Any] = {
                "tokens.npy": written.tokens.astype(np.uint16),
                "bounds.npy": written.bounds.astype(np.uint32),
            }
            if number == sequence:
                sample |= {f"{name}.npy": data for name, data in members.items()}
            tar.write({"__key__": f"{number:010d}", **sample})
    _publish(split, 1)


def _npy(array: Any, dtype: Any = None) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(array, dtype=dtype))
    return stream.getvalue()


def test_sequences_are_read_as_they_were_written_in_any_order(whole: Path) -> None:
    places = np.random.default_rng(0).permutation(np.concatenate([EVERY, EVERY, EVERY[:5]]))
    sequences = _read(whole, places)
    assert sequences.tokens.dtype == np.uint16
    _check(sequences, faults={}, places=places)
    _check(_read(whole, EVERY[:0].reshape(0, 2)), faults={}, places=EVERY[:0])


def test_uint32_sequences_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = random_sequences(2 * PER_SHARD, seed=1, vocab=100_000)
    write_split(tmp_path, written, per_shard=PER_SHARD, vocab=100_000)
    sequences = _read(tmp_path, EVERY[: 2 * PER_SHARD])
    assert sequences.tokens.dtype == np.uint32
    _check(sequences, faults={}, places=EVERY[: 2 * PER_SHARD], written=written)


def test_more_shards_are_read_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20
    monkeypatch.setattr(shard_cache, "MAX_OPEN_FILES", limit)
    written = random_sequences(limit + 20, seed=2)
    write_split(tmp_path, written, per_shard=1)
    places = np.array([(shard, 0) for shard in range(len(written))])
    reader = SequenceReader(_manifest(tmp_path))
    for _ in range(2):
        np.testing.assert_array_equal(reader.read(places).tokens, [sequence.tokens for sequence in written])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}/" in line]
    assert len(mapped) == limit  # tars alone: their indices are in memory


@pytest.mark.parametrize("left", [-3000, -1, 0])
def test_a_truncated_or_zero_length_tar(split: Path, left: int) -> None:
    tar, _ = _paths(split, 1)
    data = tar.read_bytes()
    tar.write_bytes(data[:left])
    expected = "it is empty" if left == 0 else f"found {len(data) + left}"
    sequences = _read(split)
    _check(sequences, faults=_rows(1, expected))
    assert all(f"{tar}: expected" in str(fault) and str(len(data)) in str(fault) for fault in sequences.faults.values())


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_tar_or_index(split: Path, which: int) -> None:
    _paths(split, 1)[which].unlink()
    _check(_read(split), faults=_rows(1, "No such file"))


@pytest.mark.parametrize("place", ["tokens", "tokens header", "bounds", "padding"])
def test_a_flipped_byte_is_named_by_sequence_and_offset(split: Path, place: str) -> None:
    tar, index = _paths(split, 1)
    row = np.load(index)[4]
    start, length, tokens_at = (int(row[column]) for column in (Column.START, Column.LENGTH, Column.TOKENS_AT))
    at = {
        "tokens": start + tokens_at + 130,
        "tokens header": start + tokens_at - 512 + 100,
        "bounds": start + int(row[Column.BOUNDS_AT]) + 130,
        "padding": start + length - 1,
    }[place]
    _flip(tar, at)
    _check(
        _read(split),
        faults={PER_SHARD + 4: f"{tar} sequence 4 at byte {start}: expected crc32 {row[2]:#010x}, found 0x"},
    )


def test_a_flipped_byte_behind_the_last_sequence_is_no_fault_of_a_sequence(split: Path) -> None:
    tar, _ = _paths(split, 1)
    _flip(tar, tar.stat().st_size - 1)
    _check(_read(split), faults={})


def test_swapped_tars_and_swapped_pairs(split: Path) -> None:
    first, second = (
        write_shard(split / f"shard-0000{shard}.tar", random_sequences(10, seed=shard), dtype="uint16")
        for shard in (1, 2)
    )
    assert first.bytes == second.bytes  # or the size alone would tell them apart
    written = [*SEQUENCES[:10], *random_sequences(10, seed=1), *random_sequences(10, seed=2), *SEQUENCES[30:]]
    for shard in (1, 2):
        _publish(split, shard)
    _check(_read(split), faults={}, written=written)
    (tar, index), (other_tar, other_index) = _paths(split, 1), _paths(split, 2)
    _swap(tar, other_tar)
    _check(_read(split), faults=_rows(1, "expected crc32") | _rows(2, "expected crc32"), written=written)
    _swap(index, other_index)
    wrong = "expected the index with sha256"
    _check(_read(split), faults=_rows(1, wrong) | _rows(2, wrong), written=written)


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


TOKENS = np.zeros(LENGTH, dtype=np.uint16)
NOT_INTEGERS = "expected an .npy of one row of uint16, uint32, int32, int64"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_npy(TOKENS[1:]), f"expected {LENGTH} tokens, found {LENGTH - 1}"),
        (_npy(np.append(TOKENS, TOKENS)), f"expected {LENGTH} tokens, found {2 * LENGTH}"),
        (_npy(TOKENS + VOCAB), f"expected ids from 0 to {VOCAB - 1}, found {VOCAB}"),
        (_npy(TOKENS + VOCAB, np.int64), f"expected ids from 0 to {VOCAB - 1}, found {VOCAB}"),
        (_npy(-np.ones(LENGTH), np.int64), f"expected ids from 0 to {VOCAB - 1}, found -1"),
        (_npy(np.full(LENGTH, 1 << 16), np.int64), f"expected ids from 0 to {VOCAB - 1}, found 65536"),
        (_npy(TOKENS.reshape(-1, 1)), NOT_INTEGERS),
        (_npy(TOKENS, np.float32), NOT_INTEGERS),
        (_npy(TOKENS, ">u2"), NOT_INTEGERS),
        (_npy(TOKENS, "S2"), NOT_INTEGERS),
        (_npy(0, np.uint16), NOT_INTEGERS),
        (_npy(TOKENS) + b"more", "as its header says, found"),
        (_npy(TOKENS)[:-1], "as its header says, found"),
        (_npy(TOKENS)[:40], "expected an .npy of integers"),
        (_npy([_Bomb()] * LENGTH, object), NOT_INTEGERS),
        (pickle.dumps(_Bomb()), "expected an .npy of integers"),
        (b"", "expected a tokens member inside the sequence"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100, "expected an .npy of integers"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000, "expected an .npy of integers"),
        (_npy(TOKENS).replace(b"(25,)", b"(9**9,)"), "expected an .npy of integers"),
    ],
)
def test_tokens_that_are_none_though_their_crc_holds(split: Path, data: bytes, message: str) -> None:
    _rewrite(split, 3, tokens=data)
    faults = _rows(1, message) if data == b"" else {PER_SHARD + 3: message}
    _check(_read(split), faults=faults)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ([0], "[0]"),
        ([], "[]"),
        ([1, LENGTH], "[1, 25]"),
        ([0, 5, 5, LENGTH], "[0, 5, 5, 25]"),
        ([0, 9, 5, LENGTH], "[0, 9, 5, 25]"),
        ([0, LENGTH + 1], "[0, 26]"),
        ([0, 0], "[0, 0]"),
        ([0, -1, LENGTH], "[0, -1, 25]"),
        (list(range(0, 30)), "[0, 1, 2, 3, 4, 5, 6, 7, …]"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_bounds_that_do_not_climb_though_their_crc_holds(
    split: Path, bounds: list[int], text: str, dtype: type[np.integer[Any]]
) -> None:
    values = np.array(bounds, dtype=np.int64).astype(dtype)
    _rewrite(split, 3, bounds=_npy(values))
    if dtype is np.uint32:
        text = text.replace("-1", str((1 << 32) - 1))
    message = f"expected bounds that climb from 0 to {LENGTH} at most, found {text}"
    _check(_read(split), faults={PER_SHARD + 3: message})


def test_bounds_with_a_known_header_and_other_bytes(split: Path) -> None:
    bounds = SEQUENCES[PER_SHARD + 3].bounds
    assert any(len(sequence.bounds) == len(bounds) for sequence in SEQUENCES[:PER_SHARD])
    for data in (_npy(bounds, np.uint32) + bytes(4), _npy(bounds, np.uint32)[:-4]):
        _rewrite(split, 3, bounds=data)
        _check(_read(split), faults={PER_SHARD + 3: "as its header says, found"})


def test_other_dtypes_of_integers_are_read_into_the_manifests(split: Path) -> None:
    sequence = SEQUENCES[PER_SHARD + 3]
    for dtype in (np.uint16, np.uint32, np.int32, np.int64):
        _rewrite(split, 3, tokens=_npy(sequence.tokens, dtype), bounds=_npy(sequence.bounds, dtype))
        sequences = _read(split)
        assert sequences.tokens.dtype == np.uint16
        _check(sequences, faults={})


def _edits(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, str]]:
    def edited(sequence: int, column: Column, value: int) -> np.ndarray:
        copy = rows.copy()
        copy[sequence, column] = value
        return copy

    huge = np.iinfo(np.int64).max
    yield edited(2, Column.START, -1), "sequence 2: expected places in"
    yield edited(2, Column.LENGTH, huge), "sequence 2: expected places in"
    yield edited(2, Column.TOKENS_AT, huge), "sequence 2: expected places in"
    yield edited(2, Column.LENGTH, 0), "sequence 2: expected at most"
    yield edited(2, Column.START, 0), "sequence 2: expected sequences that touch each other"
    yield edited(0, Column.START, 1), "sequence 0: expected sequences that touch each other"
    yield edited(9, Column.LENGTH, size), "sequence 9: expected a range that ends before byte"
    yield edited(2, Column.CRC32, -1), "sequence 2: expected a crc32"
    yield edited(2, Column.TOKENS_BYTES, 0), "sequence 2: expected a tokens member inside"
    yield edited(2, Column.TOKENS_AT, int(rows[2, Column.LENGTH])), "sequence 2: expected a tokens member inside"
    yield edited(2, Column.BOUNDS_AT, int(rows[2, Column.LENGTH])), "sequence 2: expected a bounds member inside"
    yield edited(2, Column.BOUNDS_BYTES, 0), "sequence 2: expected a bounds member"
    yield rows[:-1], "bytes, found"
    yield rows.astype(np.int32), "bytes, found"
    yield rows.astype(np.float64), "int64, found"
    yield rows.reshape(7, 10), "int64, found"
    yield np.asfortranarray(rows), "int64, found"


def test_an_index_that_points_elsewhere_though_its_hash_holds(split: Path) -> None:
    tar, index = _paths(split, 1)
    rows = np.load(index)
    for edited, message in _edits(rows, tar.stat().st_size):
        _publish(split, 1, edited)
        _check(_read(split), faults=_rows(1, message))


def test_a_shard_that_does_not_open_is_not_tried_again(split: Path) -> None:
    tar, _ = _paths(split, 1)
    data = tar.read_bytes()
    tar.unlink()
    reader = SequenceReader(_manifest(split))
    _check(reader.read(EVERY), faults=_rows(1, "No such file"))
    tar.write_bytes(data)
    _check(reader.read(EVERY), faults=_rows(1, "No such file"))
    _check(_read(split), faults={})


def _foreign(folder: Path, members: list[dict[str, bytes]], record: SampleFormat) -> Manifest:
    """A split of one shard with the given members a sample."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "a.tar", "wb") as file, TarWriter(file, mtime=0) as tar:
        for number, sample in enumerate(members):
            tar.write({"__key__": f"x/{number}", **sample})
    shard = write_index(folder / "a.tar", index_sequences(folder / "a.tar", record))
    base = _manifest(folder)
    (folder / "manifest.json").unlink()
    packer = base.packer.model_copy(update={"name": "external"})
    _changed(base, sample_format=record, shards=(shard,), packer=packer, tokens=1).write(folder)
    return _manifest(folder)


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def test_raw_and_zipped_tokens_are_read(split: Path) -> None:
    sequences = SEQUENCES[:PER_SHARD]
    places = EVERY[:PER_SHARD]
    raw = [{"u16": sequence.tokens.astype("<u2").tobytes()} for sequence in sequences]
    one = [{"tokens.npz": _npz(ids=sequence.tokens), "bounds.npy": _npy(sequence.bounds)} for sequence in sequences]
    two = [{"npz": _npz(ids=sequence.tokens.astype(np.int64), mask=sequence.tokens > 3)} for sequence in sequences]
    for members, record in (
        (raw, SampleFormat(kind="raw", tokens="u16", bounds=None)),
        (one, SampleFormat(kind="npz", tokens="tokens.npz", bounds="bounds.npy")),
        (two, SampleFormat(kind="npz", tokens="npz", bounds=None, array="ids")),
    ):
        batch = SequenceReader(_foreign(split, members, record)).read(places)
        assert not batch.faults
        np.testing.assert_array_equal(batch.tokens, [sequence.tokens for sequence in sequences])
        bounds = [sequence.bounds.tolist() if record.bounds else [0, LENGTH] for sequence in sequences]
        assert [row.tolist() for row in batch.bounds] == bounds


def _bomb() -> bytes:
    """An archive that says its array has 60 bytes, and gives a hundred megabytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ids.npy", bytes(100_000_000))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_npz(a=TOKENS, b=TOKENS), "expected one array in the .npz, found 'a.npy', 'b.npy'"),
        (_npz(), "expected one array in the .npz, found none"),
        (_npz(ids=TOKENS)[:-30], "expected an .npz, found"),
        (_npy(TOKENS), "expected an .npz, found"),
        (_npz(ids=TOKENS[1:]), f"expected {LENGTH} tokens"),
        (_npz(ids=TOKENS + VOCAB), f"expected ids from 0 to {VOCAB - 1}"),
        (_npz(ids=np.array([_Bomb()] * LENGTH, dtype=object)), NOT_INTEGERS),
        (_bomb(), "expected an array of at most"),
    ],
)
def test_an_npz_that_holds_something_else(split: Path, data: bytes, message: str) -> None:
    record = SampleFormat(kind="npz", tokens="npz", bounds=None)
    good = {"npz": _npz(ids=SEQUENCES[0].tokens)}
    sequences = SequenceReader(_foreign(split, [good, {"npz": data}, good], record)).read(
        np.array([(0, 0), (0, 1), (0, 2)])
    )
    assert sequences.faults.keys() == {1}
    assert message in str(sequences.faults[1])
    for row in (0, 2):
        np.testing.assert_array_equal(sequences.tokens[row], SEQUENCES[0].tokens)


def test_raw_tokens_of_another_length(split: Path) -> None:
    record = SampleFormat(kind="raw", tokens="u16", bounds=None)
    members = [{"u16": bytes(size)} for size in (2 * LENGTH, 2 * LENGTH - 1, 2 * LENGTH + 2)]
    sequences = SequenceReader(_foreign(split, members, record)).read(np.array([(0, 0), (0, 1), (0, 2)]))
    assert {row: str(fault).partition(": ")[2] for row, fault in sequences.faults.items()} == {
        1: f"expected uint16 tokens, found {2 * LENGTH - 1} bytes",
        2: f"expected {LENGTH} tokens, found {LENGTH + 1}",
    }


def test_a_batch_over_http_is_the_batch_of_the_disk(whole: Path) -> None:
    with serving(whole.parent) as server:
        manifest = Manifest.load(f"{server.url}/train/manifest.json")
        reader = SequenceReader(manifest)
        _check(reader.read(EVERY), faults={})
        requests = len(server.requests)
        _check(reader.read(EVERY[::-1]), faults={}, places=EVERY[::-1])
        assert len(server.requests) == requests
    assert requests == 2 + SHARDS * 4  # the manifest, and of each shard and index the size and the only block
    assert sum(shard.bytes for shard in manifest.shards) < BLOCK_BYTES


def test_a_block_that_cannot_be_fetched_is_a_fault_of_its_sequences_alone(whole: Path) -> None:
    retry = RetryPolicy(attempts=2, timeout=5, pause=0.01)

    def breaks_shard_1(handler: servers.Handler, body: bytes) -> bool:
        broken = handler.path.endswith("shard-00001.tar") and len(body) > 1
        return broken and servers.fails(500)(handler, body)

    with serving(whole.parent) as server:
        server.always = breaks_shard_1
        folder = RemoteFolder(f"{server.url}/train", retry=retry)
        reader = SequenceReader(_manifest(whole).lying_in(folder))
        sequences = reader.read(EVERY)
        _check(sequences, faults=_rows(1, "could not be read in 2 attempts: 500 Internal Server Error"))
        assert str(sequences.faults[PER_SHARD]).startswith(
            f"{server.url}/train/shard-00001.tar sequence 0 at byte 0: expected"
        )
        server.always = None
        _check(reader.read(EVERY), faults={})


def test_faults_are_the_error_that_ends_a_run() -> None:
    assert issubclass(ShardFault, OperatorFault)
