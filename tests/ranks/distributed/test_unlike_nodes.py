"""Two nodes of one rank each, which meet as in a run: files that are wrong, or other ones, on one of them end both."""

import os
import shutil
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.config.recipe import Recipe
from megadistill.errors import UserError
from megadistill.train.build import launched
from tests.ranks.harness import CONTEXT
from tests.unit.train.cases import described_data, described_teacher, recipe


def _start(rank: int, port: int, made: Recipe, pipe: Connection) -> None:
    """The error of a start on this rank, which holds a node of its own; empty where the ranks meet."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    try:
        with launched(made):
            pipe.send("")
    except UserError as error:
        pipe.send(str(error))


def _started(folder: Path, changed: Callable[[Path], None]) -> list[str]:
    """The errors of both ranks, where `changed` has changed the second node's folder of the teacher."""
    described_data(folder / "data")
    for rank in range(2):
        described_teacher(folder / f"node-{rank}")
    changed(folder / "node-1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pipes, processes = [], []
    for rank in range(2):
        manifest, teacher = folder / "data" / "manifest.json", folder / f"node-{rank}"
        made = recipe(manifest, folder / "run", teacher=teacher, distributed={"vocab_group": 2})
        ours, theirs = CONTEXT.Pipe(duplex=False)
        processes.append(CONTEXT.Process(target=_start, args=(rank, port, made, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        assert all(pipe.poll(60) for pipe in pipes), "a rank has not ended"
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def _same(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "unused.json")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (_other_weights, "the teacher in teacher.path is not the same on every node"),
        (_cut, "not a whole one"),
        (_no_tokenizer, "teacher.path: "),
        (_same, ""),
    ],
)
def test_a_node_with_another_teacher_ends_both_with_one_line(
    changed: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    first, second = _started(tmp_path, changed)
    assert first == second
    assert says in first
    assert bool(first) == bool(says)
    assert not (tmp_path / "run").exists()
