"""A file that is written has its name only once all of it is on the disk."""

from pathlib import Path

import pytest

from megadistill.io import atomic_write


def test_a_file_bears_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"first")

    def break_off() -> None:
        with atomic_write(path) as file:
            file.write(b"second")
            file.flush()
            assert path.read_bytes() == b"first"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
