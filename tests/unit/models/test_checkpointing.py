"""Activation checkpointing of a decoder's layers: the gradients, the products of the backward pass, the bytes kept."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from megadistill.config.recipe import CHECKPOINTING, Checkpointing
from megadistill.models.families import build_causal_lm, decoder, forward_inputs, load_config
from megadistill.models.layers import checkpoint_layers, saves_output
from megadistill.plan.counts.activations import LiveStorages
from tests.unit.models.cases import ALL_CASES, VOCAB

B, S = 2, 48
FAMILIES = ("llama", "gemma2", "gemma3", "qwen3_moe")

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products and calls of attention by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in PRODUCTS:
            self.counts[name] += 1
        return function(*arguments, **(keywords or {}))


def _step(
    family: str, mode: Checkpointing, *, dtype: torch.dtype = torch.float32, documents: bool = False
) -> tuple[dict[str, Tensor], Counter[str], int]:
    """Gradients of a step, products of its backward pass, bytes that live between the two passes."""
    torch.manual_seed(0)
    config = load_config({**ALL_CASES[family], "hidden_size": 32, "intermediate_size": 64}, what=family)
    model = build_causal_lm(config, vocab_size=VOCAB, dtype=dtype).train()
    inner: Any = decoder(model)
    checkpoint_layers(inner, mode)
    tokens = torch.randint(VOCAB, (B, S))
    positions = (torch.arange(S) % 20).expand(B, S) if documents else None
    with LiveStorages() as live:
        hidden = inner(**forward_inputs(inner, tokens, positions)).last_hidden_state
        bytes_retained = live.now
    with Products() as products:
        hidden.float().square().sum().backward()
    gradients = {name: each.grad for name, each in inner.named_parameters() if each.grad is not None}
    return gradients, products.counts, bytes_retained


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_checkpointing_to_the_bit(family: str, dtype: torch.dtype, documents: bool) -> None:
    expected, *_ = _step(family, "none", dtype=dtype, documents=documents)
    for mode in CHECKPOINTING[1:]:
        actual, *_ = _step(family, mode, dtype=dtype, documents=documents)
        assert actual.keys() == expected.keys()
        assert expected
        assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items()), mode


def test_experts_with_biases_are_recomputed() -> None:
    """transformers adds gpt-oss's biases to the products in place, which torch refuses of a product that is kept."""
    expected, *_ = _step("gpt_oss", "none")
    for mode in CHECKPOINTING[1:]:
        actual, *_ = _step("gpt_oss", mode)
        assert "layers.4.mlp.experts.gate_up_proj_bias" in actual
        assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items()), mode


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_recomputes_no_product_and_keeps_less(family: str) -> None:
    of_mode = {mode: _step(family, mode) for mode in CHECKPOINTING}
    products = {mode: counts for mode, (_, counts, _) in of_mode.items()}
    sizes = [size for _, _, size in of_mode.values()]
    assert products["selective"] == products["none"]
    assert products["full"].total() > products["none"].total()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.85 * sizes[0]
    assert sizes[2] < 0.5 * sizes[1]


def test_the_policy_keeps_products_and_attention_and_no_scores() -> None:
    query_HSd, key_HdS, scores_HSS = torch.empty(4, S, 16), torch.empty(4, 16, S), torch.empty(4, S, S)
    context = SelectiveCheckpointContext(is_recompute=False)

    def saves(operator: Any, *args: Tensor) -> bool:
        return saves_output(context, operator, *args) == CheckpointPolicy.MUST_SAVE

    aten = torch.ops.aten
    assert saves(aten.mm.default, scores_HSS[0], key_HdS[0])
    assert saves(aten._grouped_mm.default, query_HSd, key_HdS)
    assert saves(aten._scaled_dot_product_flash_attention.default, query_HSd)
    assert saves(torch.ops.higher_order.flex_attention, query_HSd)
    assert saves(aten.bmm.default, scores_HSS, query_HSd), "values of eager attention"
    assert not saves(aten.bmm.default, query_HSd, key_HdS), "48 tokens, 2 x 16 columns"
    assert not saves(aten.mul.Tensor, query_HSd, query_HSd)
    assert not saves(aten._softmax.default, scores_HSS)
