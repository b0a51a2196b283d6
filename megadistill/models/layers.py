"""A decoder's layers as functions of plain tensors: computed again in the backward pass, and compiled.

Both replace a layer's `forward`, and leave its hooks (ZeRO-3's) around it: what is recomputed or compiled begins and
ends where the layer's parameters are whole. Checkpointing comes first, so that one compiled function holds both.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megadistill.config.recipe import Checkpointing
from megadistill.types import to_device

MAX_VARIANTS = 64
"""Compiled variants of the layers in a process; torch's own limit is 8."""

SAVED_PRODUCTS = ("mm", "addmm", "_grouped_mm", "_scaled_mm")
"""Operators of torch whose outputs `selective` keeps: a linear layer, and all experts at once."""

SAVED_ATTENTION = ("_scaled_dot_product_", "flex_attention", "flash_attn", "megadistill::")
"""Beginnings of the names of operators that compute attention without scores in memory."""


def checkpoint_layers(decoder: Any, mode: Checkpointing) -> None:
    """Has the backward pass compute each layer again from its input: all of it, or all but `saves_output`."""
    if mode == "none":
        return
    contexts: dict[str, Any] = {}  # torch.compile takes no default by name
    if mode == "selective":
        biased = any(hasattr(module, "gate_up_proj_bias") for module in decoder.modules())
        policy = _saves_but_experts if biased else saves_output
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    for layer in decoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def offload_layer_inputs(decoder: Any) -> None:
    """Keeps the input of each layer for the backward pass in host memory, where all else is recomputed from it.

    Call it after the layers are checkpointed and compiled. Copies are queued on the stream that computes, so that no
    memory is written before it was read, and the host does not wait for them.
    """
    for layer in decoder.layers:
        layer.forward = partial(_with_input_on_host, layer.forward)


def _with_input_on_host(forward: Callable[..., Tensor], hidden: Tensor, *more: Any, **inputs: Any) -> Tensor:
    def pack(saved: Tensor) -> Tensor | _OnHost:
        # Masks, positions and parameters are in memory anyhow.
        is_input = saved.data_ptr() == hidden.data_ptr() and saved.shape == hidden.shape
        return _OnHost.of(saved) if is_input else saved

    with saved_tensors_hooks(pack, lambda packed: packed.restored() if isinstance(packed, _OnHost) else packed):
        return forward(hidden, *more, **inputs)


@dataclass(frozen=True)
class _OnHost:
    """A tensor that autograd saves, in pinned host memory."""

    copy: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_OnHost":
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
        return cls(copy.copy_(tensor.detach(), non_blocking=True), tensor.device)

    def restored(self) -> Tensor:
        return to_device(self.copy, self.device)


def saves_output(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of selective checkpointing: outputs of matrix products and of attention are kept for the backward.

    Not those of a batched product that are larger than both its operands together, the scores [S, S] of eager
    attention: they would take what checkpointing is to save, and cost two operations for each column of a head.
    """
    return CheckpointPolicy.MUST_SAVE if saves(operator, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _saves_but_experts(
    context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """`saves_output`, but for products of experts with biases, which transformers adds to them in place."""
    if operator.name().startswith("aten::_grouped_mm"):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return saves_output(context, operator, *args, **kwargs)


def saves(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether a product, or attention as one operator, is kept."""
    name = operator.name().removeprefix("aten::").partition(".")[0]
    if name in ("bmm", "baddbmm"):
        left_Bnk, right_Bkm = args[-2:]
        size = left_Bnk.shape[0] * left_Bnk.shape[1] * right_Bkm.shape[2]
        return bool(size <= left_Bnk.numel() + right_Bkm.numel())
    return name in SAVED_PRODUCTS or name.startswith(SAVED_ATTENTION)


def compile_layers(decoder: Any) -> None:
    """Compiles each layer's forward pass, and its backward pass: once for all layers of a kind.

    Layers of a kind differ in their parameters alone, which are inputs of the compiled function. One graph a layer, for
    the sizes that it is called with. It is compiled at the first call. A pass without gradients runs the code of a pass
    with them, so that both give the same result to the last bit.

    No view of a parameter is kept for the backward pass, but the parameter itself: ZeRO-3 can release it.
    """
    torch._functorch.config.recompute_views = True  # else those of experts, transposed, are kept
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    # A router's sums leave a checkpointed layer as an attribute (`student.routers`), once: not when it is recomputed.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # Warns of operators in place in a region with a policy: there are none, and a run's log would show it.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for layer in decoder.layers:
        # transformers hands a layer's number to flash-attn, for a cache that there is none of: a graph for each layer.
        for module in layer.modules():
            # But in 5.17 layers of Gemma 3n find the keys and values that they share by it.
            if hasattr(module, "layer_idx") and not hasattr(module, "kv_shared_layer_index"):
                module.layer_idx = 0
        compiled = torch.compile(layer.forward, dynamic=False, fullgraph=True)
        trains = any(parameter.requires_grad for parameter in layer.parameters())
        layer.forward = partial(_as_in_training, compiled) if trains else compiled


def _as_in_training(compiled: Callable[..., Tensor], hidden: Tensor, *more: Any, **inputs: Any) -> Tensor:
    """A layer's output. Compiled for a pass without gradients alone, it would be rounded in other places."""
    if torch.is_grad_enabled():
        return compiled(hidden, *more, **inputs)
    with torch.enable_grad():
        return compiled(hidden.detach().requires_grad_(), *more, **inputs).detach()
