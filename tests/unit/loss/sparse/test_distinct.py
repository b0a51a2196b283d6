"""Distinct ids: the noise by its definition, the law of draws without replacement, the same ids in any chunk."""

import itertools
import math

import torch

from megadistill.loss import Head
from megadistill.loss.sparse import SampledDistinct
from megadistill.loss.sparse.distinct import gumbel_noise, gumbel_of, keys
from tests.unit.loss.problems import problem
from tests.unit.loss.sparse.cases import targets_of, targets_of_logits, uniforms_for

MASK = (1 << 64) - 1


def _splitmix64(state: int) -> tuple[int, int]:
    """The next state and number, in integers that do not wrap around."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return state, x ^ (x >> 31)


def test_noise_is_of_splitmix64_from_the_tokens_key() -> None:
    assert _splitmix64(0)[1] == 0xE220A8397B1DCDAF, "its published first number for seed 0"
    keys_n = torch.tensor([0, 1, -1, 1 << 62, -(1 << 63)])
    found = gumbel_noise(keys_n, torch.arange(9))
    for key, row in zip(keys_n.tolist(), found.tolist(), strict=True):
        state = key & MASK
        for value in row:
            state, number = _splitmix64(state)
            assert math.isclose(value, -math.log(-math.log(((number >> 12) + 0.5) / 2**52)), rel_tol=1e-12)


def test_noise_is_a_number_for_every_hash() -> None:
    low, high = gumbel_of(torch.tensor([0, -1])).tolist()
    assert math.isclose(low, -math.log(53 * math.log(2)), rel_tol=1e-12)
    assert math.isclose(high, 53 * math.log(2), rel_tol=1e-12)


def test_keys_have_all_bits_of_their_random_numbers() -> None:
    uniforms = torch.tensor([[0.25], [0.25 + 2**-53], [0.0], [1 - 2**-53]], dtype=torch.float64)
    assert len(set(keys(uniforms).tolist())) == 4


def test_pairs_of_ids_follow_the_law_of_draws_without_replacement() -> None:
    """P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j); χ² of 10 pairs in 40,000 tokens, 9 degrees of freedom."""
    p, tokens = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05], dtype=torch.float64), 40_000
    teacher = Head(torch.ones(tokens, 1, dtype=torch.float64), p.log().unsqueeze(1))
    found = targets_of(teacher, SampledDistinct(2), uniforms=uniforms_for(tokens, SampledDistinct(2), seed=3))
    chi_squared = 0.0
    for i, j in itertools.combinations(range(5), 2):
        expected = tokens * float(p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])))
        count = int((found.ids == torch.tensor([i, j])).all(dim=1).sum())
        chi_squared += (count - expected) ** 2 / expected
    assert chi_squared < 9 + 5 * math.sqrt(18)
    assert torch.allclose(found.probs.sum(dim=1), torch.ones(tokens, dtype=torch.float64), rtol=1e-12)
    ratio = found.probs[:, 0] / found.probs[:, 1]
    assert torch.allclose(ratio, p[found.ids[:, 0]] / p[found.ids[:, 1]], rtol=1e-12), "the teacher's own, scaled"


def test_as_many_as_there_are_is_the_whole_distribution() -> None:
    logits = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(11, dtype=torch.float64)
    bias[3] = -math.inf
    found = targets_of_logits(logits, SampledDistinct(11), bias=bias, uniforms=uniforms_for(6, SampledDistinct(11)))
    known = [id_ for id_ in range(11) if id_ != 3]
    assert found.ids.tolist() == [known] * 6
    torch.testing.assert_close(found.probs, logits[:, known].softmax(dim=1), rtol=1e-13, atol=0)


def test_the_same_uniforms_give_the_same_ids_in_any_chunk() -> None:
    p, selection = problem(7, tokens=30), SampledDistinct(6)
    uniforms = uniforms_for(30, selection)
    found = [
        targets_of(p.teacher, selection, size=p.size, uniforms=uniforms, logit_memory=memory)
        for memory in (1, 21 * 8 * 7, 1 << 20)
    ]
    for other in found[1:]:
        assert torch.equal(other.ids, found[0].ids)
        torch.testing.assert_close(other.probs, found[0].probs, rtol=1e-12, atol=0)  # products of other shapes round
    assert found[0].ids[:2].tolist() == [[0, 6, 14, 17, 18, 19], [5, 6, 8, 11, 16, 20]], (
        "the ids of a run are part of its numbers"
    )
