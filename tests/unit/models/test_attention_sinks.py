"""Attention sinks: one more score of each head in the softmax. Every attention that `auto` may choose computes them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from megadistill.errors import UserError
from megadistill.models.attention import blockwise, masks
from megadistill.models.attention.blockwise import blockwise_attention
from megadistill.models.attention.choice import choose_attention
from megadistill.models.families import load_config
from tests.unit.models.cases import ALL_CASES

S, H, G, D = 150, 6, 3, 8
DOCUMENTS = torch.stack([torch.cat([torch.arange(40, 53), *map(torch.arange, (100, 37))]), torch.arange(S)])


class _Heads(torch.nn.Module):
    """What transformers' eager attention of gpt-oss reads of the layer that calls it."""

    num_key_value_groups = H // G

    def __init__(self, sinks: Tensor) -> None:
        super().__init__()
        self.sinks: Any = sinks


def _eager(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, first_key: Tensor | None) -> Tensor:
    mask = masks._dense_mask(first_key, S, dtype=query.dtype, device=query.device)
    output: Tensor = eager_attention_forward(_Heads(sinks), query, key, value, mask, scaling=0.3)[0]
    return output


@pytest.mark.parametrize("pieces", [1, 1 << 14])
@pytest.mark.parametrize("kind", ["causal", "both"])
def test_blockwise_attention_with_sinks_is_transformers_own(
    kind: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and all gradients, in float64; one sink is far above all scores, one far below."""
    monkeypatch.setattr(blockwise, "PIECE_ELEMENTS", pieces)
    torch.manual_seed(0)
    window = (torch.arange(S) - 69).clamp(min=0).unsqueeze(0)
    first_key = None if kind == "causal" else masks._document_starts(DOCUMENTS).maximum(window)
    inputs = [torch.randn(2, S, heads, D, dtype=torch.float64).transpose(1, 2) for heads in (H, G, G)]
    inputs.append(torch.tensor([0.5, -1.0, 12.0, 2.0, -9.0, 0.0], dtype=torch.float64))
    given = torch.randn(2, S, H, D, dtype=torch.float64)
    results = []
    for attention in (
        lambda q, k, v, sinks: blockwise_attention(q, k, v, first_key, 0.3, None, sinks),
        lambda q, k, v, sinks: _eager(q, k, v, sinks, first_key),
    ):
        leaves = [each.detach().requires_grad_() for each in inputs]
        output = attention(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, given)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_sinks_keep_their_type_and_their_operator_its_shapes() -> None:
    query, key = torch.randn(2, H, 70, D), torch.randn(2, G, 70, D)
    sinks = torch.randn(H, dtype=torch.bfloat16, requires_grad=True)
    blockwise_attention(query, key, key, None, 0.3, 2.0, sinks).sum().backward()  # softcapped as well
    assert sinks.grad is not None
    assert (sinks.grad.dtype, sinks.grad.shape) == (torch.bfloat16, (H,))
    for more in ((), (sinks.detach().float().requires_grad_(),)):
        arguments = (query.requires_grad_(), key, key, None, 0.3, None, *more)
        torch.library.opcheck(blockwise_attention, arguments, test_utils=("test_schema", "test_faketensor"))


HERE: dict[str, Any] = {"accelerator": False, "precision": "bfloat16", "documents": False, "sequence_length": 6}
GPU = {**HERE, "accelerator": True, "triton": True, "flash": False}


@pytest.mark.parametrize(
    ("facts", "value", "reason"),
    [
        (HERE, "flex", "attention sinks: blockwise on a CPU"),
        (GPU, "flex", "attention sinks"),
        ({**GPU, "flash": True}, "flex", "attention sinks"),
        ({**GPU, "triton": False}, "eager", "attention sinks, by dense masks, as flex cannot run"),
    ],
)
def test_auto_chooses_what_computes_sinks(facts: dict[str, Any], value: str, reason: str) -> None:
    chosen = choose_attention("auto", load_config(ALL_CASES["gpt_oss"], what="test"), **facts)
    assert chosen.value == value
    assert chosen.reason.startswith(reason)


def test_flash_attn_is_not_chosen_where_it_would_lose_windows() -> None:
    windows, none = ({**ALL_CASES["qwen2_moe"], "use_sliding_window": each} for each in (True, False))
    facts = {**GPU, "flash": True, "sequence_length": 64}
    assert choose_attention("auto", load_config(none, what="test"), **facts).value == "flash"
    assert choose_attention("auto", load_config(windows, what="test"), **facts).value == "flex"
    masks_alone = load_config({**ALL_CASES["smollm3"], "use_sliding_window": False}, what="test")
    assert choose_attention("auto", masks_alone, **facts).value == "flex"
    assert choose_attention("auto", load_config(ALL_CASES["smollm3"], what="test"), **facts).value == "flash"
    with pytest.raises(UserError, match=r"flash-attn is not told of this family's sliding windows: set a.b to auto"):
        choose_attention("flash", load_config(windows, what="test"), **facts, key="a.b")


@pytest.mark.parametrize(("setting", "words"), [("sdpa", "no sinks"), ("flash", "flash-attn has no attention sinks")])
def test_an_attention_without_sinks_is_refused(setting: Any, words: str) -> None:
    config = load_config(ALL_CASES["gpt_oss"], what="test")
    with pytest.raises(UserError, match=rf"^a.b is {setting}, .*{words}.*: set a.b to auto"):
        choose_attention(setting, config, **{**GPU, "flash": True}, key="a.b")
