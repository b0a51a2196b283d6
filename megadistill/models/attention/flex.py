"""Our attention function, `flex`, as transformers calls it: softcap, sinks, windows, documents, no scores in memory.

On an accelerator it is torch's flex_attention, whose kernels Triton compiles, with block masks. On a CPU, where that
has no backward, it is blockwise.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface

from megadistill.models.attention.blockwise import blockwise_attention
from megadistill.models.attention.masks import FLEX

MAX_VARIANTS = 64
"""Compiled variants of the kernel in a process: of models, windows, batch sizes, with and without gradients."""


def flex_attention_forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, S, D], key [B, G, S, D], value [B, G, S, V] -> [B, S, H, V]. V is D but in latent attention.

    `attention_mask`: what `attention_inputs` made for the layer, its window included: a block mask, or the first keys
    [B or 1, 1, S, 1]; None: causal. `s_aux`: [H], the heads' attention sinks (see `blockwise.compute`).
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries and {key.shape[2]} keys: flex computes whole sequences, no cache")
    if not isinstance(attention_mask, BlockMask):
        first_key = None if attention_mask is None else attention_mask[:, 0, :, 0]
        columns = value.shape[-1]
        if columns != query.shape[-1]:
            query, key, value = _of_one_width(query, key, value)
        return blockwise_attention(query, key, value, first_key, scaling, softcap, s_aux)[..., :columns], None
    # A layer that is compiled has flex_attention in its graph.
    kernel: Any = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    output = kernel(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcapped(softcap),
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **({} if s_aux is None else {"return_aux": AuxRequest(lse=True)}),
    )
    if s_aux is not None:
        # A sink adds exp(sink) to the sum that the softmax divides by, and nothing to the values.
        output, statistics = output
        output = output * torch.sigmoid(statistics.lse - s_aux.float().view(-1, 1)).unsqueeze(-1).to(output.dtype)
    return output.transpose(1, 2).contiguous(), None


def _of_one_width(*heads: Tensor) -> list[Tensor]:
    """The heads with columns of 0 behind them: they change no product, and their sums are cut off."""
    width = max(each.shape[-1] for each in heads)
    return [torch.nn.functional.pad(each, (0, width - each.shape[-1])) for each in heads]


@cache
def compiled_flex_attention() -> Callable[..., Any]:
    """flex_attention as kernels. One that torch could not compile is an error: it would build the scores [S, S]."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _softcapped(softcap: float) -> Callable[..., Tensor]:
    def bounded(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bounded


def register_flex() -> None:
    """Makes transformers' layers find the function by its name."""
    AttentionInterface.register(FLEX, flex_attention_forward)
