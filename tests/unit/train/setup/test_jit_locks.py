"""Stale locks of JIT builds are refused with their path; one of a running build is not."""

import os
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from megadistill.errors import UserError
from megadistill.train.setup.jit_locks import STALE_SECONDS, extensions_folder, refuse_stale_jit_locks


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an extension."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    folder = tmp_path / "extensions" / "cpu_adam"
    folder.mkdir(parents=True)
    return folder


def _written(file: Path, ago: float) -> Path:
    file.touch()
    os.utime(file, (time.time() - ago, time.time() - ago))
    return file


def test_a_lock_left_behind_is_refused_with_its_path(build: Path) -> None:
    _written(build / "build.ninja", STALE_SECONDS + 300)
    lock = _written(build / "lock", STALE_SECONDS + 300)
    with pytest.raises(UserError, match=f"written nothing for 15 minutes.*cpu_adam would wait.*rm {lock}$"):
        refuse_stale_jit_locks()
    lock.unlink()
    refuse_stale_jit_locks()


def test_a_build_at_work_is_no_fault(build: Path) -> None:
    """A long one: its lock is old, and its newest file is not."""
    _written(build / "lock", STALE_SECONDS * 3)
    _written(build / "cpu_adam.o", STALE_SECONDS - 30)
    refuse_stale_jit_locks()


def test_no_folder_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    refuse_stale_jit_locks()


@pytest.mark.parametrize("named", [True, False])
def test_looks_where_torch_builds(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if named:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "named"))
    truth = cpp_extension._get_build_directory("an_extension", verbose=False)
    assert extensions_folder() / "an_extension" == Path(truth)
