"""Reading a checkpoint of 512 ranks: each rank opens the files that hold its pieces, whatever the new number of ranks.

One file on as many ranks as wrote it. Otherwise a parameter's piece lies in at most ceil(written / reading) + 1 files;
those of small parameters, which some ranks have no element of, lie in others than those of the matrices.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.models.families import load_config, parameter_shapes
from megadistill.student.state import STEP_KEY
from megadistill.train.checkpoint import format as checkpoint_format
from megadistill.train.checkpoint.format import (
    Checkpoint,
    CheckpointManifest,
    ranges_of,
    rank_file,
)
from tests.paths import ROOT
from tests.scale.checkpoint_files import (
    KINDS,
    SHAPES,
    STEPS,
    Reads,
    header_bytes,
    piece_of,
    resume,
    whole_of,
    write_checkpoint,
)
from tests.scale.fake_world import in_fake_world

WRITTEN = 512
"""Ranks that wrote the checkpoint."""
READING = [WRITTEN, 2 * WRITTEN, WRITTEN // 2, 3 * WRITTEN // 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "step-00000009", WRITTEN)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()
    monkeypatch.setattr(checkpoint_format, "safe_open", reads.open)
    return reads


def _read_all(checkpoint: Checkpoint, rank: int, world: int) -> dict[str, Tensor]:
    """The state of a rank, in the order in which `StudentState.load` reads it."""
    keys = [f"{kind}/{name}" for name in SHAPES for kind in KINDS]
    state = {
        key: checkpoint.read(key, *piece_of(math.prod(SHAPES[key.partition("/")[2]]), rank, world)) for key in keys
    }
    return {**state, STEP_KEY: checkpoint.read(STEP_KEY, 0, 1)}


def test_on_as_many_ranks_each_opens_its_own_file_and_no_other(folder: Path, reads: Reads) -> None:
    for rank in range(WRITTEN):
        checkpoint = Checkpoint(folder, _manifest(folder))
        _read_all(checkpoint, rank, WRITTEN)
        assert checkpoint.rng_state(rank, WRITTEN) == torch.tensor([rank])
        assert reads.opened[rank:] == [rank_file(rank, WRITTEN)]
    assert reads.header_bytes <= WRITTEN * (header_bytes(folder / rank_file(0, WRITTEN)) + 64), "512 headers in all"
    assert reads.calls <= WRITTEN * (len(KINDS) * len(SHAPES) + 2), "one call a piece, and none for an empty one"


@pytest.mark.parametrize("reading", READING)
def test_the_state_is_bitwise_the_same_and_few_files_are_opened(folder: Path, reads: Reads, reading: int) -> None:
    files = math.ceil(WRITTEN / reading) + 1
    state: dict[str, list[Tensor]] = {}
    for rank in range(reading):
        checkpoint, before = Checkpoint(folder, _manifest(folder)), len(reads.opened)
        for key, values in _read_all(checkpoint, rank, reading).items():
            state.setdefault(key, []).append(values)
        opened = reads.opened[before:]
        assert len(opened) == len(set(opened)), "each file is opened once"
        assert len(opened) <= 2 * files, "those of the matrices, and those of the norms"
    for key in state.keys() - {STEP_KEY}:
        assert torch.equal(torch.cat(state[key]), whole_of(key)), key
    assert torch.cat(state[STEP_KEY]).tolist() == [STEPS] * reading
    assert reads.calls <= 2 * files * reading * len(KINDS) * len(SHAPES)
    assert max(Counter(reads.opened).values()) <= 2 * (math.ceil(reading / WRITTEN) + 1), "readers of a file"


def _manifest(folder: Path) -> CheckpointManifest:
    """Read once, as rank 0 does for all."""
    if folder not in _MANIFESTS:
        _MANIFESTS[folder] = Checkpoint(folder).manifest
    return _MANIFESTS[folder]


_MANIFESTS: dict[Path, CheckpointManifest] = {}


@pytest.mark.parametrize(("reading", "rank"), [(WRITTEN, WRITTEN - 1), (2 * WRITTEN, 333), (3 * WRITTEN // 4, 100)])
def test_a_student_of_512_ranks_and_others_is_given_its_pieces(folder: Path, reading: int, rank: int) -> None:
    reads, wrong = in_fake_world(reading, resume, folder, rank=rank)
    assert wrong == []
    assert len(reads.opened) <= (1 if reading == WRITTEN else 2 * (math.ceil(WRITTEN / reading) + 1))


@pytest.mark.parametrize("model", ["gemma-2-9b", "llama-3.1-8b"])
@pytest.mark.parametrize(("written", "reading"), [(2048, 2048), (2048, 4096), (2048, 1024), (2048, 1536), (512, 384)])
def test_published_models_need_no_more_files_than_that(model: str, written: int, reading: int) -> None:
    shapes = parameter_shapes(load_config(ROOT / "recipes/models" / model, what="test")).values()
    files, most = math.ceil(written / reading) + 1, 0
    for rank in range(reading):
        opened: set[int] = set()
        for numel in {shape.numel() for shape in shapes}:
            own = {each.rank for each in ranges_of(numel, *piece_of(numel, rank, reading), written)}
            assert len(own) <= files
            opened |= own
        most = max(most, len(opened))
    assert most <= (1 if written == reading else 2 * files)


def test_verifying_is_shared_and_reads_the_files_that_a_rank_needs(folder: Path) -> None:
    numel = max(math.prod(shape) for shape in SHAPES.values())
    for reading in READING:
        verified: Counter[str] = Counter()
        for rank in range(reading):
            mine = _verified(folder, rank, reading)
            verified.update(mine)
            if reading in (WRITTEN, WRITTEN // 2):
                needed = ranges_of(numel, *piece_of(numel, rank, reading), WRITTEN)
                assert mine == [rank_file(each.rank, WRITTEN) for each in needed], "its file comes from the disk once"
        assert set(verified.values()) == {1}
        assert len(verified) == WRITTEN


def _verified(folder: Path, rank: int, reading: int) -> list[str]:
    """Files that this rank hashes."""
    names: list[str] = []
    original = checkpoint_format.record_of

    def record(path: Path) -> Any:
        names.append(path.name)
        return _manifest(folder).files[path.name]

    checkpoint_format.record_of = record
    try:
        Checkpoint(folder, _manifest(folder)).verify(rank, reading)
    finally:
        checkpoint_format.record_of = original
    return names
