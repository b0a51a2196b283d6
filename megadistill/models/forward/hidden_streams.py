"""Several streams of hidden states between layers: Gemma 3n's, of which each layer predicts all and corrects them.

transformers makes the streams from the embedding before the first layer and one hidden state of them after the last,
in the forward pass of the whole model. A stage gets and hands on all of them, one after the other in a token's row.

Legend: n streams, B sequences, S tokens of a sequence, E width.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

SPREADING = "model.altup_projections."
"""Beginning of the names of the first stage's parameters that make the streams."""

_LEAST_SQUARE = 1e-5
"""transformers' least mean square of a stream that is scaled to the first one's length."""


def hidden_streams(config: PretrainedConfig) -> int:
    """Hidden states of a token between two layers, each of the model's width."""
    return int(getattr(config, "altup_num_inputs", None) or 1)


def hand_on_streams(decoder: Any, *, is_first: bool, is_last: bool) -> None:
    """Has a stage's decoder read and give the streams as [B, S, n·E], but tokens on the first and E on the last one."""
    if not is_first:
        decoder.altup_projections = None
    if not is_last:
        decoder.altup_unembed_projections = None
    decoder.forward = MethodType(_forward, decoder)


def _forward(
    self: Any,
    *,
    attention_mask: dict[str, Tensor | None],
    position_ids: Tensor | None,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    per_layer_inputs: Tensor | None = None,
    use_cache: bool = False,
) -> BaseModelOutputWithPast:
    if input_ids is not None:
        embedded_BSE = self.embed_tokens(input_ids)
        per_layer_inputs = self.project_per_layer_inputs(embedded_BSE, self.get_per_layer_inputs(input_ids))
        streams_nBSE = _spread(embedded_BSE, self.altup_projections)
    else:
        assert inputs_embeds is not None
        split = inputs_embeds.view(*inputs_embeds.shape[:2], hidden_streams(self.config), self.config.hidden_size)
        streams_nBSE = split.permute(2, 0, 1, 3).contiguous()
    assert per_layer_inputs is not None
    if position_ids is None:
        position_ids = torch.arange(streams_nBSE.shape[2], device=streams_nBSE.device).unsqueeze(0)
    kinds = self.config.layer_types
    rotary = {kind: self.rotary_emb(streams_nBSE, position_ids, kind) for kind in sorted(set(kinds))}
    shared: dict[Any, tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(self.layers):
        streams_nBSE = layer(
            streams_nBSE,
            rotary[kinds[number]],
            per_layer_inputs[:, :, number, :],
            shared_kv_states=shared,
            attention_mask=attention_mask[kinds[number]],
            position_ids=position_ids,
        )
    if self.altup_unembed_projections is None:
        return BaseModelOutputWithPast(last_hidden_state=streams_nBSE.permute(1, 2, 0, 3).flatten(2))
    merged_BSE = torch.mean(_spread(streams_nBSE, self.altup_unembed_projections), dim=0)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(merged_BSE))


def _spread(first: Tensor, projections: Any) -> Tensor:
    """[n, B, S, E]: a hidden state [B, S, E], or the first of n, and projections of it, or of each, of its length."""
    is_one = first.dim() == 3
    start_BSE = first if is_one else first[0]
    length_BS1 = torch.mean(start_BSE**2, dim=-1, keepdim=True) ** 0.5
    streams = [start_BSE]
    for number, projection in enumerate(projections, 1):
        projected_BSE = projection(start_BSE if is_one else first[number]).to(start_BSE.dtype)
        square_BS1 = torch.mean(projected_BSE**2, dim=-1, keepdim=True)
        streams.append(projected_BSE * length_BS1 / torch.sqrt(square_BS1.clamp(min=_LEAST_SQUARE)))
    return torch.stack(streams, dim=0)
