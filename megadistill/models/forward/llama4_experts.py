"""Llama 4's experts, each on its own tokens: transformers has every expert compute on every token, times 0 on most.

Legend: T tokens, K width, E experts, k of a token, M pairs of a token and an expert, sorted by expert.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_mm


def use_own_tokens(decoder: Any) -> None:
    """Has each block of experts of a decoder compute its tokens' experts alone."""
    for layer in decoder.layers:
        block: Any = getattr(layer, "feed_forward", None)
        if hasattr(block, "router") and hasattr(block, "shared_expert"):
            block.forward = MethodType(_forward, block)


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] of hidden states [.., K], and the router's logits [T, E]: a token's input is scaled by its score."""
    hidden_TK = hidden_states.reshape(-1, self.hidden_dim)
    logits_TE = nn.functional.linear(hidden_TK, self.router.weight)
    chosen_logits_Tk, expert_Tk = torch.topk(logits_TE, self.top_k, dim=1)
    score_M = torch.sigmoid(chosen_logits_Tk.float()).to(hidden_TK.dtype).flatten()
    expert_M, order_M = torch.sort(expert_Tk.flatten(), stable=True)
    experts_E = torch.arange(self.num_experts, device=expert_M.device, dtype=expert_M.dtype)
    ends_E = torch.searchsorted(expert_M, experts_E, right=True, out_int32=True)
    rows_MK = hidden_TK[order_M // self.top_k] * score_M[order_M].unsqueeze(-1)
    gate, up = _product(rows_MK, self.experts.gate_up_proj, ends_E).chunk(2, dim=-1)
    out_MK = _product(up * self.experts.act_fn(gate), self.experts.down_proj, ends_E)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    routed_TK = out_MK[place_M].view(-1, self.top_k, self.hidden_dim).sum(dim=1)
    return self.shared_expert(hidden_TK) + routed_TK, logits_TE


def _product(rows: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
    """Rows [M, ..] times the weight of their expert: transformers' function, which also compiles in float32."""
    product: Tensor = _grouped_mm(rows, weight, ends_E)
    return product
