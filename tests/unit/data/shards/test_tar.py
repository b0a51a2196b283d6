"""Tars that plain webdataset reads, and indices that say where everything in a tar lies."""

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from webdataset import WebDataset

from megadistill.data.shards.manifest import SampleFormat
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.shard import Shard
from megadistill.data.shards.tar import MAX_TAR_HEADER_BYTES, SAMPLE_FORMAT, index_sequences, write_shard
from megadistill.errors import UserError
from megadistill.io import file_sha256
from tests.unit.data.splits import Column, random_sequences

FOREIGN = SampleFormat(kind="raw", tokens="u16", bounds=None)


def _entry(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = len(data), kind
    return entry, data


def _tar(path: Path, *entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for entry, data in entries:
            tar.addfile(entry, io.BytesIO(data))
    return path


def _refused(path: Path, match: str, record: SampleFormat = FOREIGN) -> None:
    with pytest.raises(UserError, match=match) as refused:
        index_sequences(path, record)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_plain_webdataset_reads_the_same_sequences(tmp_path: Path) -> None:
    sequences = random_sequences(20, seed=0, vocab=70_000)
    write_shard(tmp_path / "shard.tar", sequences, dtype="uint32")
    samples = list(WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{number:010d}" for number in range(20)]
    for sequence, sample in zip(sequences, samples, strict=True):
        assert sample["tokens.npy"].dtype == sample["bounds.npy"].dtype == np.uint32
        np.testing.assert_array_equal(sample["tokens.npy"], sequence.tokens)
        np.testing.assert_array_equal(sample["bounds.npy"], sequence.bounds)


def test_the_index_says_where_every_byte_of_a_sequence_lies(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    sequences = random_sequences(9, seed=1)
    write_shard(path, sequences, dtype="uint16")
    rows, data = np.load(tmp_path / "shard.tar.idx.npy"), path.read_bytes()
    assert (rows.dtype, rows.shape) == (np.int64, (9, len(Column)))
    end = 0
    for sequence, row in zip(sequences, rows.tolist(), strict=True):
        start, length, crc32, tokens_at, tokens_bytes, bounds_at, bounds_bytes = row
        assert start == end
        end = start + length
        assert crc32 == zlib.crc32(data[start:end])
        here = data[start:end]
        np.testing.assert_array_equal(np.load(io.BytesIO(here[tokens_at : tokens_at + tokens_bytes])), sequence.tokens)
        np.testing.assert_array_equal(np.load(io.BytesIO(here[bounds_at : bounds_at + bounds_bytes])), sequence.bounds)
    assert not any(data[end:])
    assert tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict").name == "0000000000.bounds.npy"


def test_the_record_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.tar"
    shard = write_shard(path, random_sequences(3, seed=2), dtype="uint16")
    assert shard == Shard(
        name="shard-00000.tar",
        sequences=3,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        index_sha256=file_sha256(tmp_path / shard.index),
    )


def test_the_same_sequences_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path / name, random_sequences(5, seed=3), dtype="uint16") for name in ("a", "b"))
    other = write_shard(tmp_path / "c", random_sequences(5, seed=4), dtype="uint16")
    assert (first.sha256, first.index_sha256) == (second.sha256, second.index_sha256)
    assert other.sha256 != first.sha256


def test_no_sequences_or_ids_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one sample at least"):
        write_shard(tmp_path / "a.tar", [], dtype="uint16")
    bounds = np.array([0, 2], dtype=np.int32)
    for ids in ([1, 65_536], [-1, 2]):
        sequences = [*random_sequences(2, seed=0), PackedSequence(np.array(ids, dtype=np.int32), bounds)]
        with pytest.raises(ValueError, match="do not fit into uint16"):
            write_shard(tmp_path / "a.tar", sequences, dtype="uint16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_other_members_lie_inside_the_sequences(tmp_path: Path, format: int) -> None:
    long = f"data/{'n' * 180}é"
    path = _tar(
        tmp_path / "a.tar",
        _entry("data", kind=tarfile.DIRTYPE),
        _entry("__meta__", b"x"),
        _entry(f"{long}0.U16", b"abcd"),
        _entry(f"{long}0.txt", b"text" * 200),
        _entry("README", b"no sample"),
        _entry(f"{long}1.txt", b""),
        _entry(f"{long}1.u16", b"efgh"),
        format=format,
    )
    data = path.read_bytes()
    rows = index_sequences(path, FOREIGN).tolist()
    assert [data[row[0] + row[3] :][: row[4]] for row in rows] == [b"abcd", b"efgh"]
    assert rows[0][0] == 0
    assert rows[1][0] == rows[0][1]
    assert not any(data[rows[1][0] + rows[1][1] :])
    assert all(row[5:] == [0, 0] for row in rows)


def test_every_cut_of_a_tar_is_refused(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", *(_entry(f"{number}.u16", b"ab" * 300) for number in range(3)))
    whole = path.read_bytes()
    end = 3 * (512 + 1024)
    index_sequences(path, FOREIGN)
    for cut in (1, 511, 512, 600, 1023, 1024, 1536, 2048, 3072, end - 1, end, end + 512, end + 1023):
        path.write_bytes(whole[:cut])
        _refused(path, "not a whole tar|is cut off")
    path.write_bytes(whole[: end + 1024])
    index_sequences(path, FOREIGN)
    path.write_bytes(b"")
    _refused(path, "empty")
    path.unlink()
    _refused(path, "No such file")


def test_a_broken_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", *(_entry(f"{number}.u16", b"ab") for number in range(3)))
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    assert len(list(WebDataset(str(path), shardshuffle=False))) == 1
    _refused(path, "at byte 1024 a tar header was expected")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([_entry("0.u16", b"ab"), _entry("1.txt", b"ab")], "sample '1' at byte 1024 has no member u16, only 'txt'"),
        ([_entry("0.u16", kind=tarfile.SYMTYPE)], "'0.u16' is not a plain file"),
        ([_entry("0.u16", kind=tarfile.LNKTYPE)], "'0.u16' is not a plain file"),
        ([_entry("0.u16", kind=tarfile.CHRTYPE)], "'0.u16' is not a plain file"),
        ([_entry("0.u16", kind=tarfile.DIRTYPE)], "'0.u16' is not a plain file"),
        ([_entry("0.u16", b"ab"), _entry("0.u16", b"cd")], "'0.u16' twice in one sample"),
        ([_entry("README", b"ab")], "holds no samples"),
        ([], "holds no samples"),
        ([_entry("a\nb.txt", b"ab")], r"sample 'a\\nb'"),
    ],
)
def test_a_sample_that_is_no_sequence_is_refused(
    tmp_path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], match: str
) -> None:
    _refused(_tar(tmp_path / "a.tar", *entries), match)


def test_sizes_are_bounded_before_memory_is_set_aside(tmp_path: Path) -> None:
    """A PAX header and a member that claim more than they may, in a file with a hole of that size."""
    huge = MAX_TAR_HEADER_BYTES + 1
    for kind, match in ((tarfile.XHDTYPE, "has a header of"), (tarfile.GNUTYPE_LONGNAME, "has a header of")):
        entry = tarfile.TarInfo("0.u16")
        entry.size, entry.type = huge, kind
        path = tmp_path / "a.tar"
        path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT))
        with open(path, "r+b") as file:
            file.truncate(huge + 10_240)
        _refused(path, match)
    entry = tarfile.TarInfo("0.u16")
    entry.size = 1 << 29
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT))
    with open(path, "r+b") as file:
        file.truncate((1 << 29) + 10_240)
    _refused(path, f"has {(1 << 29) + 512} bytes, more than")


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("0.u16")
    entry.type = tarfile.GNUTYPE_SPARSE
    buffer = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    buffer[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 4)
    buffer[483 : 483 + 12] = b"%011o\0" % 4
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(buffer) + bytes(10_240))
    _refused(path, "is not a plain file")


def test_own_shards_are_indexed_by_reading_them_back(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", random_sequences(4, seed=5), dtype="uint16")
    np.testing.assert_array_equal(
        index_sequences(tmp_path / "a.tar", SAMPLE_FORMAT), np.load(tmp_path / "a.tar.idx.npy")
    )


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    whole = _tar(tmp_path / "a.tar", _entry("0.u16", b"ab")).read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole))
    _refused(tmp_path / "a.tar", "is not a whole tar")
