"""What processes of a node share, and when a file counts as the one that was verified before."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from megadistill.data.storage import local, node_files
from megadistill.data.storage.base import Bytes, Folder, sha256_of
from megadistill.data.storage.local import MappedFile
from megadistill.data.storage.node_files import open_copy, shared_array


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_file_rewritten_in_place_with_its_former_time_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `cp -p` or `rsync --inplace --times` over the file: same inode, size and time of modification."""
    path = tmp_path / "shard.idx.npy"
    path.write_bytes(b"one")
    monkeypatch.setattr(local, "SETTLED_NS", -1)
    before, times = MappedFile(path).identity, path.stat()
    time.sleep(0.05)  # ticks of the file system's clock
    with open(path, "r+b") as file:
        file.write(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert before is not None
    assert MappedFile(path).identity != before


def test_a_file_that_was_just_written_with_an_old_time_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "shard.idx.npy"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    assert MappedFile(path).identity is None


def test_a_process_hashes_its_nodes_copy_once_and_again_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"an index" * 100
    hashed: list[int] = []

    def counted(file: Bytes) -> str:
        hashed.append(file.size)
        return sha256_of(file)

    monkeypatch.setattr(local, "SETTLED_NS", -1)
    monkeypatch.setattr(node_files, "sha256_of", counted)
    remote, sha256 = _Remote(content), hashlib.sha256(content).hexdigest()
    for _ in range(3):  # the first one fetches it
        copy = open_copy(remote, "a.idx.npy", size=len(content), sha256=sha256)
        assert bytes(copy.read(0, copy.size)) == content
    assert (len(hashed), remote.reads) == (1, 1)
    path = tmp_path / f"megadistill-{os.getuid()}" / sha256
    path.write_bytes(content[:-1] + b"!")
    copy = open_copy(remote, "a.idx.npy", size=len(content), sha256=sha256)
    assert bytes(copy.read(0, copy.size)) == content
    assert (len(hashed), remote.reads) == (2, 2)


class _Remote:
    """A remote folder of one file."""

    location = "memory"
    identity: object = None

    def __init__(self, content: bytes) -> None:
        self._content, self.reads, self.size = content, 0, len(content)

    def sibling(self, path: str) -> Folder:
        return self

    def open(self, name: str) -> Bytes:
        return self

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        return self._content

    def prefetch(self, ranges: object) -> None:
        pass

    def read(self, start: int, length: int) -> memoryview:
        self.reads += 1
        return memoryview(self._content)[start : start + length]


@pytest.mark.parametrize("kind", ["own", "open to others", "link"])
def test_processes_share_an_array_in_a_folder_of_the_user_alone(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"megadistill-{os.getuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    shared_array("verified", 4)[2] = 7
    assert shared_array("verified", 4).tolist() == ([0, 0, 7, 0] if kind == "own" else [0, 0, 0, 0])
