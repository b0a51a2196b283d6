"""Initial values: keyed by (seed, name), blind to padding, and distributed as transformers would fill them."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.models import initial_weights
from megadistill.models.families import EMBEDDING, HEAD, family, load_config, parameter_shapes
from megadistill.models.initial_weights import BLOCK, RandomWeights, initial_range, initial_tensor
from megadistill.rng import keyed_generator
from tests.unit.models.cases import ALL_CASES, CASES, all_cases


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
    edge = initial_range(EMBEDDING, (1024, 1024), BLOCK - 2, BLOCK + 2, std=0.02, seed=0)
    expected = torch.tensor([0.031924486, 0.021155216, 0.0030683386, -0.04150041])
    torch.testing.assert_close(edge, expected, rtol=1e-6, atol=0.0)


def test_a_tensor_of_one_block_has_the_values_of_releases_before_there_were_blocks() -> None:
    """Numbers of smaller models do not move: golden losses, the smoke run, and the tests' own."""
    former = keyed_generator(7, "a.weight").standard_normal((512, BLOCK // 512), dtype=np.float32)
    ours = initial_tensor("a.weight", (513, BLOCK // 512), std=1.0, seed=7)
    assert torch.equal(ours[:512], torch.from_numpy(former))
    assert abs(ours[512].mean()) < 6 / math.sqrt(BLOCK // 512)
    assert not torch.isin(ours[512], ours[:512]).all(), "the next block has a generator of its own"


def test_any_cut_of_a_tensor_has_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts of ZeRO-3 on 1 to 4,096 ranks, and anywhere else. Blocks are small here, so that pieces are of many."""
    monkeypatch.setattr(initial_weights, "BLOCK", 64)
    shape = (31, 67)
    whole, numel = initial_tensor("a.weight", shape, std=0.02, seed=1).flatten(), math.prod(shape)
    generator = np.random.default_rng(0)
    cuts = [np.sort(generator.integers(0, numel + 1, size=100)) for _ in range(20)]
    for world in (1, 2, 3, 4, 7, 64, 512, 4096):
        cuts.append(np.minimum(np.arange(world + 1) * -(-numel // world), numel))
    for cut in cuts:
        for start, stop in pairwise(map(int, cut)):
            values = initial_range("a.weight", shape, start, stop, std=0.02, seed=1)
            assert torch.equal(values, whole[start:stop]), (start, stop)
    assert len(set(whole.tolist())) == numel, "no block repeats another"


def test_ranges_at_the_edges_of_real_blocks() -> None:
    shape = (3, BLOCK // 2 + 1)
    whole = initial_tensor("a.weight", shape, std=0.02, seed=1).flatten()
    edges = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, len(whole)]
    for start in edges:
        for stop in edges[edges.index(start) :]:
            assert torch.equal(initial_range("a.weight", shape, start, stop, std=0.02, seed=1), whole[start:stop])


@pytest.mark.parametrize("case", ["gemma2", "llama-tied", "mixtral", "qwen2"])
def test_the_ranks_of_a_model_hold_its_values_and_zeros_in_the_padding(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, biases, stacked experts, tied heads and padded vocabularies."""
    monkeypatch.setattr(initial_weights, "BLOCK", 1000)
    config = load_config({**CASES[case], "vocab_size": 256, "num_hidden_layers": 2}, what="test")
    weights = RandomWeights(config, vocab_size=250, seed=5, dtype=torch.bfloat16)
    seen: Counter[str] = Counter()
    for name, shape in parameter_shapes(config).items():
        values = {"std": config.initializer_range, "norm": family(config).norm_init}
        expected = initial_tensor(name, shape, seed=5, **values).to(torch.bfloat16).float()
        if name in (EMBEDDING, HEAD):
            expected[250:] = 0
            seen["padded"] += 1
        for world in (1, 2, 64):
            size = -(-shape.numel() // world)
            cuts = [(min(rank * size, shape.numel()), min((rank + 1) * size, shape.numel())) for rank in range(world)]
            read = torch.cat([weights.read(name, shape, *cut) for cut in cuts])
            assert torch.equal(read, expected.flatten()), (name, world)
    assert seen["padded"] == (1 if config.tie_word_embeddings else 2)


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("padded", [251, 256, 1024])
def test_the_true_rows_do_not_depend_on_the_padding(width: int, padded: int) -> None:
    true = initial_tensor(EMBEDDING, (250, width), std=0.02, seed=3)
    assert torch.equal(initial_tensor(EMBEDDING, (padded, width), std=0.02, seed=3)[:250], true)


@pytest.mark.parametrize("case", all_cases())
def test_every_parameter_has_the_mean_and_spread_that_transformers_gives_it(case: str) -> None:
    config = load_config(ALL_CASES[case], what="test")
    torch.manual_seed(0)
    norm = family(config).norm_init
    for name, theirs in AutoModelForCausalLM.from_config(config).named_parameters():
        ours = initial_tensor(name, theirs.shape, std=config.initializer_range, seed=0, norm=norm)
        assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
        if theirs.numel() == 1:  # of an activation
            torch.testing.assert_close(ours, theirs.detach())
            continue
        if theirs.std() == 0:
            assert torch.equal(ours, theirs), name
            continue
        # six standard errors of a mean and of a standard deviation
        error = 6 * config.initializer_range / math.sqrt(theirs.numel())
        for sample in (ours, theirs):
            assert abs(sample.mean()) < error, name
            assert abs(sample.std() - config.initializer_range) < error, name
