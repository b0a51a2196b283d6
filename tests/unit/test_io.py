"""A file that is written has its name only once all of it is on the disk; a folder has one writer of a kind."""

from pathlib import Path

import pytest

from megadistill.errors import UserError
from megadistill.io import atomic_write, locked_folder


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


def test_a_second_writer_is_kept_out_of_a_folder_until_the_first_has_left(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "targets"
    with (
        locked_folder(folder, problem="the first"),
        pytest.raises(UserError, match="another one writes there"),
        locked_folder(folder, problem="another one writes there"),
    ):
        pass
    with locked_folder(folder, problem="the first has left"):
        assert list(folder.iterdir()) == [], "a folder that holds anything else may be refused"
