"""A decoder's layers as functions of plain tensors: computed again in the backward pass, and compiled.

Both replace a layer's `forward`, and leave its hooks (ZeRO-3's) around it: what is recomputed or compiled begins and
ends where the layer's parameters are whole. Checkpointing comes first, so that one compiled function holds both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.utils.checkpoint import checkpoint

ContextFunction: TypeAlias = Callable[[], tuple[Any, Any]]
"""Makes the contexts of a layer's forward pass and of its recomputation, as `torch.utils.checkpoint` takes it."""

MAX_VARIANTS = 64
"""Compiled variants of the layers in a process; torch's own limit is 8."""


def checkpoint_layers(decoder: Any, context: ContextFunction | None = None) -> None:
    """Has the backward pass compute each layer again from its input, but for what `context` keeps."""
    contexts = {} if context is None else {"context_fn": context}  # torch.compile takes no default by name
    for layer in decoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def compile_layers(decoder: Any) -> None:
    """Compiles each layer's forward pass, and its backward pass: once for all layers of a kind.

    Layers of a kind differ in their parameters alone, which are inputs of the compiled function. One graph a layer, for
    the sizes that it is called with. It is compiled at the first call.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    for layer in decoder.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, fullgraph=True)
