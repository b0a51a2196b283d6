"""Draws from the teacher's distribution: unbiased, to the smallest probability, the same in any chunk."""

import math

import pytest
import torch
from torch import Tensor

from megadistill.loss import Head
from megadistill.loss.sparse import Sampled
from megadistill.types import SparseTargets
from tests.unit.loss.problems import problem
from tests.unit.loss.sparse.cases import targets_of, targets_of_logits, uniforms_for


def _teacher(V: int, seed: int, exponent: float = 1.2) -> Tensor:
    """[V] float64: a Zipfian distribution, shuffled."""
    p = torch.arange(1, V + 1, dtype=torch.float64) ** -exponent
    return (p / p.sum())[torch.randperm(V, generator=torch.Generator().manual_seed(seed))]


def _mean_target(found: SparseTargets, V: int) -> Tensor:
    """[V]: the mean over tokens of the targets."""
    kept = found.ids >= 0
    return torch.zeros(V, dtype=torch.float64).index_add(0, found.ids[kept], found.probs[kept].double()) / len(found)


def test_counts_of_a_row_add_up_to_the_draws() -> None:
    p, draws = problem(4, tokens=40), 9
    found = targets_of(
        p.teacher,
        Sampled(draws),
        size=p.size,
        uniforms=uniforms_for(40, Sampled(draws)),
    )
    counts = found.probs * draws
    assert torch.equal(counts, counts.round())
    assert counts.sum(dim=1).tolist() == [draws] * 40
    for row, count in zip(found.ids, counts, strict=True):
        kept = row[row >= 0]
        assert torch.equal(kept, kept.unique())
        assert torch.equal(row >= 0, count > 0)
        assert (row[len(kept) :] == -1).all()
    assert (found.log_tail == -math.inf).all()
    assert (found.ids[:, -1] >= 0).any(), "the last column is somebody's"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_counts_are_an_unbiased_estimate(dtype: torch.dtype) -> None:
    """150,000 draws of 40 ids: every mean within 5 standard errors, and χ² where 39 degrees of freedom put it."""
    V, tokens, draws = 40, 3000, 50
    p = _teacher(V, seed=5)
    logits = p.log().to(dtype).expand(tokens, V)
    weight, hidden = logits[:1].T.contiguous(), torch.ones(tokens, 1, dtype=dtype)
    found = targets_of(Head(hidden, weight), Sampled(draws), uniforms=uniforms_for(tokens, Sampled(draws), seed=6))
    mean = _mean_target(found, V)
    error = (p * (1 - p) / (tokens * draws)).sqrt()
    assert ((mean - p).abs() < 5 * error).all()
    chi_squared = float((tokens * draws * (mean - p).square() / p).sum())
    assert 39 - 3.5 * math.sqrt(78) < chi_squared < 39 + 5 * math.sqrt(78)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ids_below_the_resolution_of_float32_are_drawn(dtype: torch.dtype) -> None:
    """A thousand ids of 1e-9 each at the end of the order, where a float32 sum of the distribution stands still at 1.

    With stratified draws each of 1e-10, those ids get a thousandth of a millionth each, to the last one.
    """
    V = 1002
    p = torch.full((V,), 1e-9, dtype=torch.float64)
    p[0], p[1] = 0.6, 0.4 - 1e-6
    steps = torch.arange(10_000, dtype=torch.float64)
    uniforms = (1 - 1e-6 + (steps + 0.5) * 1e-10).unsqueeze(1)
    hidden, weight = torch.ones(10_000, 1, dtype=dtype), p.log().to(dtype).unsqueeze(1)
    found = targets_of(Head(hidden, weight), Sampled(1), uniforms=uniforms)
    counts = found.ids.flatten().bincount(minlength=V)
    # In float32 the two likely ids' logits are off by 3e-8, which moves the start of the others by as much: 30 ids.
    whole = counts[2:] if dtype == torch.float64 else counts[102:900]
    assert (whole - 10).abs().max() <= 1
    assert counts[1] <= (1 if dtype == torch.float64 else 500)


def test_draws_at_the_edges() -> None:
    """u = 0 is the first id with a mass, u just below 1 the last; a u on an edge belongs to the id after it."""
    p = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0]], dtype=torch.float64)
    uniforms = torch.tensor([[0.0, 0.25, 0.4999, 0.5, 1 - 2**-53]], dtype=torch.float64)
    found = targets_of_logits(p.log(), Sampled(5), uniforms=uniforms)
    assert found.ids.tolist() == [[1, 2, 4]]
    assert found.probs[0].tolist() == pytest.approx([0.2, 0.4, 0.4])


def test_the_same_uniforms_give_the_same_ids_in_any_chunk() -> None:
    p, uniforms = problem(7, tokens=30), uniforms_for(30, Sampled(11))
    found = [
        targets_of(p.teacher, Sampled(11), size=p.size, uniforms=uniforms, logit_memory=memory)
        for memory in (1, 21 * 8 * 7, 1 << 20)
    ]
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids)
        assert torch.equal(other.probs, found[0].probs)
