"""Digests of the models' folders, which one rank of a node makes for all, and every node must have."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.distributed.launch import Launch
from megadistill.errors import UserError
from megadistill.teacher.local_copy import copy_folder
from megadistill.train.setup.setup import check_node, prepare
from tests.unit.train.cases import described_data, described_teacher, recipe

LAUNCH = Launch(rank=0, world=2, local_rank=0, local_world=2)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return described_data(tmp_path / "data")


def _rewrite(folder: Path, change: float) -> None:
    """Other weights in a file of the size and the time of before."""
    path = folder / "model.safetensors"
    before = path.stat()
    save_file({name: torch.add(tensor, change) for name, tensor in load_file(path).items()}, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def _checked(manifest: Path, run: Path, *, copies: Path | None = None, **parts: Any) -> dict[str, str]:
    made = recipe(manifest, run, **parts)
    if copies is not None:
        assert made.teacher is not None
        made = made.model_copy(update={"teacher": made.teacher.model_copy(update={"local_copy": str(copies)})})
    return check_node(prepare(made, LAUNCH, checks_models=False), LAUNCH)


def test_nodes_compare_the_weights_that_a_student_starts_from(manifest: Path, tmp_path: Path) -> None:
    """Each rank reads its own elements of them: those of unlike nodes would be a mixture of two models."""
    weights = described_teacher(tmp_path / "weights")
    first = _checked(manifest, tmp_path / "run", student={"weights": str(weights)})
    _rewrite(weights, 1.0)
    second = _checked(manifest, tmp_path / "run", student={"weights": str(weights)})
    assert first.keys() == second.keys() == {"the model in student.weights"}
    assert first != second


def test_a_copy_that_is_not_the_teacher_is_refused(manifest: Path, tmp_path: Path) -> None:
    """Sizes and times do not tell models apart on a file system that gives every file the same time."""
    path, copies = described_teacher(tmp_path / "teacher"), tmp_path / "disk"
    assert "teacher.local_copy" in _checked(manifest, tmp_path / "run", teacher=path, copies=copies)
    _rewrite(path, 1.0)
    with pytest.raises(UserError, match=r"^teacher\.local_copy: .* is another model than .*: rm -r ") as caught:
        _checked(manifest, tmp_path / "run", teacher=path, copies=copies)
    assert str(copy_folder(path, copies)) in str(caught.value)
