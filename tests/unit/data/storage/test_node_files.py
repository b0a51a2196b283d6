"""What processes of a node share, and when a file counts as the one that was verified before."""

import os
import time
from pathlib import Path

import pytest

from megadistill.data.storage import local
from megadistill.data.storage.local import MappedFile
from megadistill.data.storage.node_files import shared_array


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
