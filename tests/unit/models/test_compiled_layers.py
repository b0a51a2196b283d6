"""Compiled layers: one graph for all layers of a kind, the eager gradients, and no view of a weight kept.

torch's own backend (inductor) writes C++ for half a minute; but for one test the graphs are run by `aot_eager`, which
takes the same steps up to there: tracing, the backward pass, what is kept for it.
"""

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager, aot_eager_decomp_partition
from torch._dynamo.utils import counters

from megadistill.config.recipe import CHECKPOINTING, Checkpointing
from megadistill.models.experts import routers
from megadistill.models.families import build_causal_lm, decoder, forward_inputs, load_config
from megadistill.models.layers import checkpoint_layers, compile_layers
from megadistill.student.routers import Routers
from tests.unit.models.cases import ALL_CASES, CASES, VOCAB

B, S = 2, 12
DOCUMENTS = torch.tensor([[*range(7), 0, *range(4)], [*range(S)]])
ALL, FIRST = sorted(CASES), ["llama", "gemma3", "qwen3_moe"]
MORE: dict[str, Checkpointing] = {
    "cohere2": "none",
    "glm4": "full",
    "gpt_neox": "selective",
    "gpt_oss": "selective",
    "granite": "none",
    "ministral3": "none",
    "phi3": "selective",
    "qwen2_moe": "none",
}
KINDS = {
    "gpt_oss": 2,
    "qwen2_moe": 2,
    "cohere2": 2,
    "gemma3": 2,
    "qwen2": 2,
    "qwen3": 2,
    "exaone4": 2,
    "qwen3_moe": 2,
    "qwen3_moe-step": 2,
}
"""Kinds of layers: with and without a window, or experts; else 1."""

thorough = pytest.mark.thorough


def skip_untraced_experts(family: str) -> None:
    """Skips experts where transformers' product of them on a CPU has a backward pass that torch cannot trace."""
    if "moe" in family or "mixtral" in family:
        major, minor = map(int, version("transformers").split(".")[:2])
        if (major, minor) < (5, 23):
            pytest.skip("experts on a CPU are traced from transformers 5.23 on")


class Graphs:
    """A backend that counts the graphs that torch has traced."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        self.number += 1
        return aot_eager(graph, inputs, **options)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    backend = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield backend
    torch._dynamo.reset()


def build(family: str, *, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    torch.manual_seed(0)
    config = load_config({**ALL_CASES[family], "hidden_size": 32, "intermediate_size": 16, **keys}, what=family)
    return decoder(build_causal_lm(config, vocab_size=VOCAB, dtype=dtype).train())


def gradients(inner: Any, positions: Tensor | None = None) -> dict[str, Tensor]:
    """The output of a pass, and the gradient of each parameter."""
    inner.zero_grad()
    tokens = torch.arange(B * S).view(B, S)
    hidden = inner(**forward_inputs(inner, tokens, positions)).last_hidden_state
    hidden.float().square().sum().backward()
    named = {name: each.grad.clone() for name, each in inner.named_parameters() if each.grad is not None}
    return {"hidden": hidden.detach(), **named}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *[pytest.param(name, mode, marks=thorough) for name in ALL for mode in CHECKPOINTING if name not in FIRST],
        *[(name, mode) for name, mode in zip(FIRST, CHECKPOINTING, strict=True)],
        ("llama", "selective"),
        *[pytest.param(name, mode, marks=thorough) for name, mode in MORE.items()],
    ],
)
def test_layers_of_a_kind_are_compiled_once(family: str, mode: Checkpointing, graphs: Graphs) -> None:
    skip_untraced_experts(family)
    inner = build(family)
    passes = (None, DOCUMENTS, None)
    expected = [gradients(inner, positions) for positions in passes]
    checkpoint_layers(inner, mode)
    compile_layers(inner)
    for number, positions in enumerate(passes):
        assert_equal(gradients(inner, positions), expected[number])
        assert graphs.number <= KINDS.get(family, 1) * (1 + (number > 0)), "one for each kind, and one with documents"
    assert graphs.number < len(inner.layers)


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=thorough)])
@pytest.mark.parametrize("mode", ["full", *[pytest.param(mode, marks=thorough) for mode in ("none", "selective")]])
def test_sums_of_routers_are_read_once_and_differentiable(family: str, mode: Checkpointing, graphs: Graphs) -> None:
    skip_untraced_experts(family)
    inner = build(family)
    reader = Routers(routers(inner), inner.layers)
    tokens, weights = torch.arange(B * S).view(B, S), torch.linspace(0, 1, B * S)

    def sums() -> list[Tensor]:
        reader.begin(weights, differentiable=True)
        hidden = inner(**forward_inputs(inner, tokens, None)).last_hidden_state
        read = reader.end()
        values = [hidden, read.probabilities_LE, read.log_z_squared_L, read.tokens_LE]
        if torch.is_grad_enabled():
            inner.zero_grad()
            sum(value.square().sum() for value in values).backward()
        return values

    def step() -> dict[str, Tensor]:
        values = {str(number): value.detach() for number, value in enumerate(sums())}
        return values | {name: each.grad.clone() for name, each in inner.named_parameters() if each.grad is not None}

    expected = step()
    checkpoint_layers(inner, mode)
    compile_layers(inner)
    assert_equal(step(), expected)
    assert graphs.number == KINDS.get(family, 1)
    with torch.no_grad():
        again = sums()
    assert not any(value.requires_grad for value in again)
    assert_equal({str(number): value for number, value in enumerate(again)}, {key: expected[key] for key in "0123"})
    assert graphs.number == KINDS.get(family, 1), "a pass without gradients runs the same code"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("mode", ["none", *[pytest.param(mode, marks=thorough) for mode in CHECKPOINTING[1:]]])
def test_no_view_of_a_weight_lives_until_the_backward_pass(
    family: str, mode: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 frees a parameter's memory by pointing the parameter elsewhere: a view would keep it."""
    skip_untraced_experts(family)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_eager_decomp_partition))
    torch._dynamo.reset()
    inner = build(family, num_hidden_layers=2)
    checkpoint_layers(inner, mode)
    compile_layers(inner)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = inner(**forward_inputs(inner, torch.arange(B * S).view(B, S), None)).last_hidden_state
    weights = {each.untyped_storage().data_ptr(): name for name, each in inner.layers.named_parameters()}
    own = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() in weights]
    torch._dynamo.reset()
    assert hidden.requires_grad
    assert len({id(tensor) for tensor in own}) >= len(inner.layers), "the weights themselves are kept"
    assert [
        weights[each.untyped_storage().data_ptr()] for each in own if not isinstance(each, torch.nn.Parameter)
    ] == []


@pytest.mark.parametrize("mode", ["full", *[pytest.param(mode, marks=thorough) for mode in CHECKPOINTING[:2]]])
def test_a_recomputed_layer_drops_what_it_dropped(mode: Checkpointing, graphs: Graphs) -> None:
    """The output, with an MLP of zeros and less its input, is linear in the last product of attention."""
    inner = build("llama", num_hidden_layers=1, attention_dropout=0.5)
    (layer,) = inner.layers
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    checkpoint_layers(inner, mode)
    compile_layers(inner)
    seen = forward_inputs(inner, torch.arange(B * S).view(B, S), None)
    x = inner.embed_tokens(seen["input_ids"]).detach().requires_grad_()
    places = torch.arange(S).view(1, S)
    rotary = inner.rotary_emb(x, position_ids=places)
    mask = torch.ones(S, S, dtype=torch.bool).tril().view(1, 1, S, S)
    outputs = []
    for _ in range(2):
        layer.zero_grad()
        output = (layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=places) - x).sum()
        output.backward()
        weight = layer.self_attn.o_proj.weight
        torch.testing.assert_close((weight.grad * weight).sum(), output)
        outputs.append(output.item())
    assert outputs[0] != outputs[1]


@thorough
def test_a_second_start_compiles_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's cache on disk has the kernels of the first one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        inner = build("llama", num_hidden_layers=2)
        expected = gradients(inner)
        checkpoint_layers(inner, "full")
        compile_layers(inner)
        torch.testing.assert_close(gradients(inner)["hidden"], expected["hidden"])
        runs.append((counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]))
    torch._dynamo.reset()
    assert runs[0] == (2, 0), "the forward pass of both layers, and the backward"
    assert runs[1][0] == 0
