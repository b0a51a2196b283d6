"""Stale locks of JIT builds are refused with their path; one of a running build is not."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder.async_io import AsyncIOBuilder
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
from deepspeed.ops.op_builder.quantizer import QuantizerBuilder
from torch.utils import cpp_extension

from megadistill.errors import UserError
from megadistill.train.setup.jit_locks import (
    STALE_SECONDS,
    extensions_folder,
    extensions_of,
    refuse_stale_jit_locks,
)


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
        refuse_stale_jit_locks(["cpu_adam"])
    lock.unlink()
    refuse_stale_jit_locks(["cpu_adam"])


def test_the_lock_of_another_program_is_no_fault(build: Path) -> None:
    _written(build / "lock", STALE_SECONDS + 300)
    _written(build, STALE_SECONDS + 300)
    with pytest.raises(UserError):
        refuse_stale_jit_locks(["quantizer", "cpu_adam"])
    refuse_stale_jit_locks(["quantizer", "deepspeed_shm_comm"])


@pytest.mark.parametrize(
    ("zero", "on_gpus"),
    [
        ({}, ()),
        ({"zero_quantized_weights": False, "offload_optimizer": {"device": "cpu"}}, ()),
        ({"zero_quantized_nontrainable_weights": True}, ("quantizer",)),
        ({"offload_optimizer": {"device": "nvme"}, "zero_quantized_weights": True}, ("quantizer", "async_io")),
    ],
)
def test_a_run_builds_the_extensions_of_its_settings(
    zero: dict[str, Any], on_gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert extensions_of({"zero_optimization": zero}) == on_gpus
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert extensions_of({"zero_optimization": zero}) == ("deepspeed_shm_comm",)


def test_the_names_of_extensions_are_those_of_deepspeed() -> None:
    assert QuantizerBuilder.NAME == "quantizer"
    assert AsyncIOBuilder.NAME == "async_io"
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"


def test_a_build_at_work_is_no_fault(build: Path) -> None:
    """A long one: its lock is old, and its newest file is not."""
    _written(build / "lock", STALE_SECONDS * 3)
    _written(build / "cpu_adam.o", STALE_SECONDS - 30)
    refuse_stale_jit_locks(["cpu_adam"])


def test_no_folder_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    refuse_stale_jit_locks(["cpu_adam"])


@pytest.mark.parametrize("named", [True, False])
def test_looks_where_torch_builds(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if named:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "named"))
    truth = cpp_extension._get_build_directory("an_extension", verbose=False)
    assert extensions_folder() / "an_extension" == Path(truth)
