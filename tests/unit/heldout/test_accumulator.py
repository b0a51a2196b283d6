"""Sums of an evaluation: the edges of bins and of deciles, and NaN."""

import math

import numpy as np
import pytest
import torch

from megadistill.distributed.launch import Launch
from megadistill.evaluate.evaluate import ranks
from megadistill.heldout.accumulator import BINS, Accumulator, Totals, entropy_deciles
from megadistill.loss import TokenTerms

ALONE = Launch(rank=0, world=1, local_rank=0, local_world=1)


def _totals(confidence: list[float]) -> Totals:
    accumulator, ones = Accumulator(1), torch.ones(len(confidence))
    accumulator.add(TokenTerms(ones, ones, torch.tensor(confidence, dtype=torch.float64), ones, None), 0)
    with ranks(ALONE) as alone:
        return accumulator.totals(None, alone)


def test_a_bin_begins_at_its_edge_and_certainty_is_in_the_last() -> None:
    totals = _totals([0.0, 0.5 / BINS, 1 / BINS, 1.5 / BINS, 20 / BINS, 0.999, 1.0])
    counts, confidence, correct = totals.by_bin_KB3[0].T
    assert counts.tolist() == [2.0, 2.0] + [0.0] * 18 + [3.0]
    assert confidence[20] == pytest.approx(20 / BINS + 1.999)
    assert correct.tolist() == counts.tolist()


def test_a_confidence_that_is_no_number_breaks_nothing() -> None:
    assert _totals([math.nan, 0.5]).by_bin_KB3[0, :, 0].sum() == 2


def test_equal_entropies_are_shared_out_in_the_order_of_the_tokens() -> None:
    with ranks(ALONE) as alone:
        same = entropy_deciles([torch.full((13,), 2.0), torch.full((7,), 2.0)], alone)
        mixed = entropy_deciles([torch.tensor([3.0, 1.0, 3.0, 2.0])], alone)
        none = entropy_deciles([], alone)
    assert same.decile_N.tolist() == (np.arange(20) // 2).tolist()
    assert same.bounds == ((2.0, 2.0),) * 10
    assert mixed.decile_N.tolist() == [5, 0, 7, 2]
    assert mixed.bounds == ((1.0, 1.0), None, (2.0, 2.0), None, None, (3.0, 3.0), None, (3.0, 3.0), None, None)
    assert none.decile_N.tolist() == []
    assert none.bounds == (None,) * 10
