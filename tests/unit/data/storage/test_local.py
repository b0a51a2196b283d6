"""Local folders hold regular files alone."""

import os
from pathlib import Path

import pytest

from megadistill.data.storage.open import folder_of


def test_a_pipe_or_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=r"it is (not a regular file|a folder)"):
            folder_of(str(tmp_path)).open(name)
