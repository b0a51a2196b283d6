"""Attention masks, made without a question to the device: causal, within a window, within a document.

They are those of transformers, whose models first ask the device whether positions restart anywhere, to leave a mask
out where the attention knows what is causal. That is one or two host-device syncs a forward pass, and each waits for
all that was queued; the caller knows the answer.

Legend: B sequences, S tokens of a sequence.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PretrainedConfig


def attention_masks(
    config: PretrainedConfig,
    positions: Tensor | None,
    shape: tuple[int, int],
    *,
    by_kind: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | dict[str, Tensor | None]:
    """The `attention_mask` of a decoder's forward pass over `shape` = (B, S) tokens.

    Args:
        positions: [B, S], which restart at 0 where a document begins; None: a row is one document.
        by_kind: whether the family takes a mask for each kind of layer. Else the one mask is that of all its layers,
            and a mask of no element stands for none (see `omit_empty_masks`): None would have the model ask.
    """
    document_BS = None if positions is None else (positions == 0).cumsum(dim=1)
    window = getattr(config, "sliding_window", None)

    def mask(window: int | None) -> Tensor | None:
        return _mask(config, document_BS, shape, window=window, dtype=dtype, device=device)

    if by_kind:
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: mask(windows[kind]) for kind in sorted(set(config.layer_types))}
    only = mask(window)
    return torch.empty(0, 0, 0, 0, device=device) if only is None else only


def _mask(
    config: PretrainedConfig,
    document_BS: Tensor | None,
    shape: tuple[int, int],
    *,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """[B, 1, S, S]: bool for torch's attention, or in `dtype`, 0 and its lowest number, to add to scores.

    None where torch's attention needs none: its own flag says causal, with which it can take its fastest kernel.
    """
    B, S = shape
    adds = config._attn_implementation == "eager"
    reaches = window is None or window > S
    if document_BS is None and reaches and not adds:
        return None
    place = torch.arange(S, device=device)
    allowed = place <= place.unsqueeze(1)
    if window is not None:
        allowed = allowed & (place > place.unsqueeze(1) - window)
    allowed = allowed.expand(B, 1, S, S)
    if document_BS is not None:
        allowed = allowed & (document_BS[:, None, :, None] == document_BS[:, None, None, :])
    if not adds:
        return allowed
    return torch.zeros((), dtype=dtype, device=device).where(allowed, torch.finfo(dtype).min)


def omit_empty_masks(decoder: Any) -> None:
    """Has each layer of a decoder that is called with a mask of no element compute without one."""
    for layer in decoder.layers:
        layer.register_forward_pre_hook(_without_empty_mask, with_kwargs=True)


def _without_empty_mask(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    return None if mask is None or mask.numel() else (args, {**kwargs, "attention_mask": None})
