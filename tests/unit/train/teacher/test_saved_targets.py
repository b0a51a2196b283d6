"""Saved targets: a micro-batch that is computed twice is stored once, and a rollback opens the set anew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.train.teacher import saved_targets
from megadistill.train.teacher.saved_targets import SavedTargets
from megadistill.types import SparseTargets, Tail, TokenBatch
from tests.unit.train.cases import topology


class Writer:
    """Records the calls of a `TargetWriter`."""

    made: list["Writer"]

    def __init__(self, folder: Path, key: Any, *, rank: int) -> None:
        self.calls: list[Any] = []
        Writer.made.append(self)

    def add(self, slots: torch.Tensor, digests: torch.Tensor, targets: SparseTargets) -> None:
        assert torch.equal(slots, digests)
        assert torch.equal(targets.ids[:, 0], slots.repeat_interleave(2)), "the targets of these slots"
        assert len(targets.probs) == len(targets.log_tail) == len(targets.ids)
        self.calls.append(slots.tolist())

    def flush(self) -> None:
        self.calls.append("flush")


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> SavedTargets:
    Writer.made = []
    monkeypatch.setattr(saved_targets, "TargetWriter", Writer)
    key: Any = None
    return SavedTargets(Path("targets"), key, topology())


def add(saved: SavedTargets, *slots: int, surplus: int = 0) -> None:
    """`surplus`: of the rows, at their end. A row has two tokens."""
    tokens = torch.zeros(len(slots), 2, dtype=torch.int64)
    is_surplus = torch.arange(len(slots)) >= len(slots) - surplus
    numbers = torch.tensor(slots)
    batch = TokenBatch(tokens, tokens, numbers, numbers, tokens.bool(), surplus=is_surplus)
    ids = numbers.repeat_interleave(2).unsqueeze(1)
    saved.add(batch, SparseTargets(ids, ids.float(), ids[:, 0].float(), Tail.OTHER))


def test_a_micro_batch_that_is_computed_twice_is_stored_once(saved: SavedTargets) -> None:
    saved.open()
    for slots in ((0, 1), (0, 1), (2, 3), (0, 1)):
        add(saved, *slots)
    assert Writer.made[0].calls == [[0, 1], [2, 3], [0, 1]]


def test_a_rollback_writes_what_is_in_memory_and_opens_anew(saved: SavedTargets) -> None:
    assert saved.finish() is None, "nothing was opened: the run was over when it started"
    saved.open()
    add(saved, 4)
    saved.open()
    add(saved, 4)
    assert [writer.calls for writer in Writer.made] == [[[4], "flush"], [[4]]]


def test_surplus_rows_are_not_stored(saved: SavedTargets) -> None:
    """Their slot is another row's, which stores it, on this rank or on another."""
    saved.open()
    add(saved, 6, 7, 7, 7, surplus=2)
    add(saved, 7, 7, surplus=2)
    assert Writer.made[0].calls == [[6, 7], []]
