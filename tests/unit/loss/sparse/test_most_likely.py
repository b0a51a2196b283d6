"""The most likely ids: ties, thresholds, nuclei, and tails too small for `1 - Σ`."""

import math

import pytest
import torch

from megadistill.loss.sparse import Selection, Threshold, TopK, TopP
from megadistill.types import Tail
from tests.unit.loss.sparse.cases import TAILS, targets_of_logits


@pytest.mark.parametrize("tail", TAILS)
def test_of_equals_the_lowest_ids_are_selected(tail: Tail) -> None:
    """Two above, nine equal to the last of five: `topk` alone takes others, and an unstable sort mixes them."""
    logits = torch.zeros(3, 300)
    logits[:, 7::30] = 1.0
    logits[:, [250, 40]] = 2.0
    assert targets_of_logits(logits, TopK(5), tail).ids.tolist() == [[40, 250, 7, 37, 67]] * 3
    for k in (4, 200):
        assert targets_of_logits(torch.zeros(2, 300), TopK(k), tail).ids.tolist() == [list(range(k))] * 2


def test_a_threshold_above_every_probability() -> None:
    """Of ten equal ids none has a probability of 0.2; of the second token one does."""
    logits = torch.zeros(2, 10, dtype=torch.float64)
    logits[1, 4] = 3.0
    for tail in (Tail.OTHER, Tail.DROPPED):
        found = targets_of_logits(logits, Threshold(0.2), tail)
        assert found.ids.tolist() == [[-1], [4]]
        assert found.probs[0].tolist() == [0.0]
        assert found.log_tail[0].item() == pytest.approx(0.0, abs=1e-15)
        nothing = targets_of_logits(logits[:1], Threshold(0.2), tail)
        assert nothing.ids.shape == nothing.probs.shape == (1, 0)
    renormalised = targets_of_logits(logits, Threshold(0.2), Tail.RENORMALISED)
    assert renormalised.ids.tolist() == [[0], [4]]
    assert renormalised.probs.tolist() == [[1.0], [1.0]]
    assert targets_of_logits(logits[:1], Threshold(0.1), Tail.OTHER).ids.tolist() == [list(range(10))]


def test_top_p_is_the_smallest_set_that_reaches_the_mass() -> None:
    p = torch.tensor([[0.1, 0.5, 0.05, 0.25, 0.1]], dtype=torch.float64)
    for mass, ids in ((0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 3, 0]), (0.94, [1, 3, 0, 4])):
        found = targets_of_logits(p.log(), TopP(mass, 100), Tail.DROPPED)
        assert found.ids.tolist() == [ids]
        assert found.probs.sum() >= mass
        assert found.probs.sum() - found.probs[0, -1] < mass
    assert targets_of_logits(p.log(), TopP(0.94, 2), Tail.DROPPED).ids.tolist() == [[1, 3]]


@pytest.mark.parametrize("selection", [TopK(4), Threshold(1e-6), TopP(0.999999, 4)])
def test_a_small_tail_keeps_its_digits_in_float32(selection: Selection) -> None:
    """A tail of 6e-7: what is left of `1 - Σ` in float32 is off by 10 % or more."""
    logits = torch.full((1, 64), -18.4)
    logits[0, [5, 17, 40, 63]] = torch.tensor([1.0, 0.25, -1.0, -0.5])
    log_p = logits.double().log_softmax(dim=1)
    tail = log_p[0, torch.isin(torch.arange(64), torch.tensor([5, 17, 40, 63]), invert=True)].exp().sum().item()
    assert 1e-7 < tail < 1e-6
    found = targets_of_logits(logits, selection, Tail.OTHER)
    assert found.ids.tolist() == [[5, 17, 63, 40]]
    assert found.log_tail.dtype == torch.float32
    assert found.log_tail.exp().item() == pytest.approx(tail, rel=3e-6)
    assert abs(1 - found.probs.sum().item() - tail) > 0.03 * tail


def test_a_tail_below_the_smallest_number_is_still_a_number() -> None:
    logits = torch.tensor([[0.0, -2e4, -2e4, 1e4]])
    found = targets_of_logits(logits, TopK(1), Tail.OTHER)
    assert found.log_tail.item() == pytest.approx(-1e4, rel=1e-7)
    found = targets_of_logits(logits, TopK(2), Tail.OTHER)
    assert found.log_tail.item() == pytest.approx(-3e4 + math.log(2), rel=1e-7)
    assert targets_of_logits(logits, TopK(4), Tail.OTHER).log_tail.item() == -math.inf
