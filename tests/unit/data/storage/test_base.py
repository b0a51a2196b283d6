"""Every kind of folder gives the same bytes, within bounds, and an error for everything else."""

import hashlib
import random
from pathlib import Path

import pytest

from megadistill.data.storage.base import Folder, sha256_of
from megadistill.data.storage.remote import BLOCK_BYTES
from megadistill.io import file_sha256
from tests.unit.data.storage.conftest import SIZE


def test_any_range_of_any_folder_is_the_files_own_bytes(folder: Folder, data: bytes) -> None:
    file = folder.open("shard.tar")
    assert file.size == SIZE
    draws = random.Random(1)
    ranges = [(start, draws.randrange(0, 3000)) for start in draws.choices(range(SIZE - 3000), k=50)]
    ranges += [(0, SIZE), (0, 0), (SIZE, 0), (SIZE - 1, 1), (BLOCK_BYTES - 1, 2), (BLOCK_BYTES, BLOCK_BYTES)]
    folder.prefetch((file, start, length) for start, length in ranges)
    for start, length in ranges:
        assert bytes(file.read(start, length)) == data[start : start + length]


def test_the_hash_of_an_open_file_is_the_hash_of_the_file(folder: Folder, data: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(data).hexdigest()
    assert sha256_of(folder.open("shard.tar")) == digest
    assert file_sha256(tmp_path / "split" / "shard.tar") == digest
    assert file_sha256(tmp_path / "split" / "empty") == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (SIZE + 5, 0), (5, -1)])
def test_a_range_outside_of_the_file_is_an_error(folder: Folder, start: int, length: int) -> None:
    with pytest.raises(OSError, match=f"it has {SIZE} bytes"):
        folder.open("shard.tar").read(start, length)


def test_a_missing_and_an_empty_file_are_errors(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        folder.open("other.tar")
    assert missing.value.strerror
    with pytest.raises(OSError, match="it is empty"):
        folder.open("empty")


def test_a_whole_file_is_read_within_its_bound(folder: Folder, data: bytes) -> None:
    assert folder.read_whole("shard.tar", max_bytes=SIZE) == data
    with pytest.raises(OSError, match=f"{SIZE} bytes, more than the {SIZE - 1} allowed"):
        folder.read_whole("shard.tar", max_bytes=SIZE - 1)


def test_a_sibling_lies_below_or_beside(folder: Folder, data: bytes) -> None:
    assert folder.sibling("../split").read_whole("shard.tar", max_bytes=SIZE) == data
    assert folder.sibling("a").sibling("../b").location == f"{folder.location}/b"
