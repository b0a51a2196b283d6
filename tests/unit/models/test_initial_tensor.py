"""Initial values: keyed by (seed, name), blind to padding, and distributed as transformers would fill them."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.models.families import EMBEDDING, family, load_config
from megadistill.models.initial_weights import initial_tensor
from tests.unit.models.cases import CASES


def test_the_same_name_and_seed_give_the_same_numbers_whatever_was_drawn_before() -> None:
    first = initial_tensor("a.weight", (7, 5), std=0.02, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, initial_tensor("a.weight", (7, 5), std=0.02, seed=1))
    assert not torch.equal(first, initial_tensor("a.weight", (7, 5), std=0.02, seed=2))
    assert not torch.equal(first, initial_tensor("b.weight", (7, 5), std=0.02, seed=1))


def test_the_numbers_are_these() -> None:
    """A change here changes every run that starts from a seed: it needs a Numerics line in the CHANGELOG."""
    tensor = initial_tensor(EMBEDDING, (2, 2), std=0.02, seed=0)
    expected = torch.tensor([[0.030046141, 0.015409504], [-0.00864528, 0.003847604]])
    torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("padded", [251, 256, 1024])
def test_the_true_rows_do_not_depend_on_the_padding(width: int, padded: int) -> None:
    true = initial_tensor(EMBEDDING, (250, width), std=0.02, seed=3)
    assert torch.equal(initial_tensor(EMBEDDING, (padded, width), std=0.02, seed=3)[:250], true)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_the_mean_and_spread_that_transformers_gives_it(case: str) -> None:
    config = load_config(CASES[case], what="test")
    torch.manual_seed(0)
    norm = family(config).norm_init
    for name, theirs in AutoModelForCausalLM.from_config(config).named_parameters():
        ours = initial_tensor(name, theirs.shape, std=config.initializer_range, seed=0, norm=norm)
        assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
        if theirs.std() == 0:
            assert torch.equal(ours, theirs), name
            continue
        # six standard errors of a mean and of a standard deviation
        error = 6 * config.initializer_range / math.sqrt(theirs.numel())
        for sample in (ours, theirs):
            assert abs(sample.mean()) < error, name
            assert abs(sample.std() - config.initializer_range) < error, name
