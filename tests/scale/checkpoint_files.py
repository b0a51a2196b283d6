"""A checkpoint of a small student in the files of any number of ranks, and a count of what a reader opens and reads."""

import math
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.models.families import load_config, parameter_shapes
from megadistill.student.optimizer import MASTER
from megadistill.student.state import STEP_KEY
from megadistill.train.checkpoint import format as checkpoint_format
from megadistill.train.checkpoint.format import (
    FORMAT,
    RNG_KEY,
    Checkpoint,
    CheckpointManifest,
    rank_file,
    record_of,
    write_manifest,
)
from tests.scale.fake_world import build_student
from tests.unit.train.cases import cursor_of

KINDS = (MASTER, "exp_avg", "exp_avg_sq")
STEPS = 7.0
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 3072,  # divides over all of these ranks
    "tie_word_embeddings": False,
}
SHAPES = {name: tuple(shape) for name, shape in parameter_shapes(load_config(MODEL, what="test")).items()}


def whole_of(key: str) -> Tensor:
    """[numel] The state of a parameter under its key."""
    generator = torch.Generator().manual_seed(sum(key.encode()))
    return torch.randn(math.prod(SHAPES[key.partition("/")[2]]), generator=generator)


def piece_of(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Start and stop of ZeRO-3's piece."""
    size = -(-numel // world)
    return min(numel, rank * size), min(numel, (rank + 1) * size)


def write_checkpoint(folder: Path, written: int) -> Path:
    """A checkpoint of `written` files, as a run makes it. Returns its folder."""
    folder.mkdir()
    whole = {f"{kind}/{name}": whole_of(f"{kind}/{name}") for kind in KINDS for name in SHAPES}
    for rank in range(written):
        state = {key: values[slice(*piece_of(len(values), rank, written))].clone() for key, values in whole.items()}
        state |= {STEP_KEY: torch.tensor([STEPS]), RNG_KEY: torch.tensor([rank])}
        save_file(state, folder / rank_file(rank, written))
    manifest = CheckpointManifest(
        format=FORMAT,
        step=9,
        tokens=90,
        world=written,
        vocab_size=MODEL["vocab_size"],
        cursor=cursor_of(90),
        parameters=SHAPES,
        versions={},
        files={name: record_of(folder / name) for name in (rank_file(rank, written) for rank in range(written))},
    )
    write_manifest(folder / "manifest.json", manifest)
    return folder


class Reads:
    """Opened files of a checkpoint, bytes of their headers and of pieces, and calls that read a piece."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.header_bytes = 0
        self.calls = 0
        self.piece_bytes = 0

    def open(self, path: Path, **keywords: Any) -> Any:
        self.opened.append(path.name)
        self.header_bytes += header_bytes(path)
        return _CountedFile(safe_open(path, **keywords), self)

    def counted(self, values: Tensor) -> Tensor:
        self.piece_bytes += values.nbytes
        return values


class _CountedFile:
    def __init__(self, file: Any, reads: Reads) -> None:
        self._file, self._reads = file, reads

    def get_slice(self, key: str) -> "_CountedSlice":
        self._reads.calls += 1
        return _CountedSlice(self._file.get_slice(key), self._reads)

    def get_tensor(self, key: str) -> Tensor:
        self._reads.calls += 1
        return self._reads.counted(self._file.get_tensor(key))


class _CountedSlice:
    def __init__(self, piece: Any, reads: Reads) -> None:
        self._piece, self._reads = piece, reads

    def get_shape(self) -> list[int]:
        shape: list[int] = self._piece.get_shape()
        return shape

    def __getitem__(self, span: slice) -> Tensor:
        return self._reads.counted(self._piece[span])


def header_bytes(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


def resume(topology: Topology, folder: Path) -> tuple[Reads, list[str]]:
    """What a real student reads when it is given the state, and keys of its state that are not the file's."""
    reads = Reads()
    setattr(checkpoint_format, "safe_open", reads.open)  # noqa: B010  # in a process of its own
    student = build_student(topology, load_config(MODEL, what="test"))
    student.state.load(Checkpoint(folder).read)
    wrong = []
    for key, values in student.state.snapshot().items():
        if key == STEP_KEY:
            expected = torch.tensor([STEPS])
        else:
            whole = whole_of(key)
            expected = whole[slice(*piece_of(len(whole), topology.shard_rank, topology.shard_world))]
        if not torch.equal(values, expected):
            wrong.append(key)
    return reads, wrong
