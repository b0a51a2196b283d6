"""Sums over the tokens of a student's forward pass that the losses of its routers are made of.

Legend: N tokens of a micro-batch, L layers with experts, E experts of a layer, K experts of a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


@dataclass(frozen=True)
class RouterSums:
    """Sums over a micro-batch's tokens, in float32; the first two are differentiable.

    They add up over micro-batches and ranks.
    """

    probabilities_LE: Tensor
    """Probability of each expert, each token times its weight."""
    log_z_squared_L: Tensor
    """(log Z)² of the router's logits, each token times its weight."""
    tokens_LE: Tensor
    """Number of tokens that each expert computes, those of weight 0 left out. A token counts for each of its K."""


class Routers:
    """Reads the routers of a student in its forward passes. Made after `deepspeed.initialize`.

    With activation checkpointing a layer's forward pass runs again in the backward pass. The sums are computed there
    too, since autograd needs the same tensors, but are not read a second time.
    """

    def __init__(self, modules: Mapping[int, Module]) -> None:
        """`modules`: number of a layer -> its router (see `models.experts.routers`)."""
        self.layers = tuple(modules)
        """Numbers of the layers with experts."""
        self._weights_N: Tensor | None = None
        self._differentiable = False
        self._read: list[tuple[Tensor, Tensor, Tensor]] | None = None
        for module in modules.values():
            module.register_forward_hook(self._after_router)

    def begin(self, weights_N: Tensor | None, *, differentiable: bool = False) -> None:
        """Call it before a forward pass. `weights_N`: weight of each token, float32; None: nothing is read."""
        self._weights_N, self._differentiable = weights_N, differentiable
        self._read = None if weights_N is None else []

    def end(self) -> RouterSums:
        """The sums of the forward pass since `begin`."""
        read, self._read = self._read, None
        assert read is not None, "begin had no weights"
        assert len(read) == len(self.layers), f"{len(read)} routers ran, of {len(self.layers)}"
        probabilities, log_z_squared, tokens = (torch.stack(layers) for layers in zip(*read, strict=True))
        return RouterSums(probabilities, log_z_squared, tokens)

    def _after_router(self, module: Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._weights_N is None:
            return
        logits_NE, _, ids_NK = output
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._differentiable):
            wide_NE = logits_NE.float()
            probabilities_E = self._weights_N @ wide_NE.softmax(dim=-1)
            log_z_squared = self._weights_N @ wide_NE.logsumexp(dim=-1).square()
        with torch.no_grad():
            counted_NK = (self._weights_N > 0).to(torch.float32).unsqueeze(1).expand_as(ids_NK)
            tokens_E = torch.zeros_like(probabilities_E).index_add_(0, ids_NK.flatten(), counted_NK.flatten())
        if self._read is not None:
            self._read.append((probabilities_E, log_z_squared, tokens_E))
