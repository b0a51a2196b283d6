"""A new kind of teacher is one class and one entry of `placement.TEACHERS`: here a toy, which a run learns from."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import Head
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher import placement
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.teacher.targets import HiddenTarget, TargetedBatch
from megadistill.types import TokenBatch
from tests.ranks.harness import run_ranks
from tests.ranks.train import test_loop as loops

manifest, teacher = loops.manifest, loops.teacher  # the fixtures

WIDTH, STEPS = 8, 2


def _random(name: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(name))


class ToyTeacher(Teacher):
    """Hidden states that are random numbers keyed by slot, and a random head."""

    def __init__(self, vocab: VocabSlice) -> None:
        self.head = torch.zeros(vocab.rows, WIDTH)
        self.head[: vocab.true_rows] = _random(1, vocab.size, WIDTH)[vocab.global_ids()[: vocab.true_rows]]

    def teacher_targets(self, batches: Iterator[TokenBatch]) -> Generator[TargetedBatch, None, None]:
        for batch in batches:
            rows = [_random(2 + slot, batch.tokens.shape[1], WIDTH) for slot in batch.slots.tolist()]
            yield TargetedBatch(batch, HiddenTarget(Head(torch.cat(rows), self.head)))


def _train(topology: Topology, manifest: str, folder: str, teacher: str) -> None:
    base = loops.recipe(Path(manifest), Path(folder)).snapshot()
    changes: dict[str, Any] = {
        "objective": "distill",
        "teacher": {"path": teacher},
        "train": {**base["train"], "steps": STEPS},
    }
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(placement.TEACHERS, "live", lambda setup, topology: ToyTeacher)
        run(prepare(Recipe.model_validate({**base, **changes}), launch), topology, stop_after=None)


def test_a_run_learns_from_a_toy_teacher(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    """Two ranks, each with half of the vocabulary, as one process with all of it."""
    runs = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        run_ranks(world, _train, str(manifest), str(folder), str(teacher))
        runs[world] = loops._numbers(folder)
        assert not (folder / "probe.safetensors").exists(), "it has no check of its own"
    assert [line["step"] for line in runs[2]] == [1, 2]
    for one, two in zip(runs[1], runs[2], strict=True):
        assert two == pytest.approx(one, rel=2e-5, abs=1e-7)
        assert two["kl"] > 0.1
        assert two["teacher_ce"] > two["teacher_entropy"], "it knows nothing of the text"
