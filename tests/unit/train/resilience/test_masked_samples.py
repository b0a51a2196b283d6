"""Masked samples: the ranks exchange slots only in a step in which one of them has masked a sample."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadistill.train.resilience import masked_samples
from megadistill.train.resilience.masked_samples import MASKED, masked_cursor, masked_flag
from megadistill.types import Cursor, TokenBatch

NOTHING = torch.zeros(2, 1, dtype=torch.int64)


def _batch(*faults: tuple[int, str]) -> TokenBatch:
    return TokenBatch(NOTHING, NOTHING, torch.arange(2), torch.arange(2), NOTHING.bool(), faults=faults)


@pytest.mark.parametrize(("reduced", "calls"), [(0.0, 0), (1.0, 1)])
def test_slots_are_gathered_where_a_rank_has_masked_one(
    reduced: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []

    def gather(batch: TokenBatch, topology: Any) -> list[int]:
        gathered.append(len(batch))
        return [7]

    monkeypatch.setattr(masked_samples, "gather_masked_slots", gather)
    stream: Any = SimpleNamespace(with_masked=lambda cursor, slots: (cursor, slots))
    events: Any = SimpleNamespace(write=lambda *name, **values: None)
    topology: Any = None
    before = Cursor("", 2)
    cursor: Any = masked_cursor(_batch(), before, stream, topology, events, step=1, reduced={MASKED: reduced})
    assert len(gathered) == calls
    assert cursor == (before, [7] if calls else [])


def test_the_flag_counts_a_ranks_own() -> None:
    assert masked_flag(_batch()) == {MASKED: 0.0}
    assert masked_flag(_batch((5, "damaged"), (6, "damaged"))) == {MASKED: 2.0}
