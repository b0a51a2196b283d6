"""Sums over the tokens of a student's forward pass that the losses of its routers are made of.

Legend: N tokens of a micro-batch, L layers with experts, E experts of a layer, K experts of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megadistill.models.experts import router_outputs


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
    """Reads the routers of a student in its forward passes. Made before the layers are compiled.

    With activation checkpointing a layer's forward pass runs again in the backward pass. The sums are computed there
    too, since autograd needs the same tensors, but are not read a second time.
    """

    def __init__(self, modules: Mapping[int, Module], layers: Sequence[Module]) -> None:
        """`modules`: number of a layer -> its router (see `models.experts.routers`). `layers`: all of the decoder."""
        self.layers = tuple(modules)
        """Numbers of the layers with experts."""
        self._routers: tuple[Any, ...] = tuple(modules.values())
        self._weights_N: Tensor | None = None
        self._differentiable = False
        self._reads = False
        for number, module in modules.items():
            module.register_forward_hook(self._after_router)
            layers[number].register_forward_hook(partial(_release_graph, module))

    def begin(self, weights_N: Tensor | None, *, differentiable: bool = False) -> None:
        """Call it before a forward pass. `weights_N`: weight of each token, float32; None: nothing is read."""
        self._weights_N, self._differentiable = weights_N, differentiable
        self._reads = weights_N is not None
        for module in self._routers:
            module.router_sums = None

    def end(self) -> RouterSums:
        """The sums of the forward pass since `begin`."""
        assert self._reads, "begin had no weights"
        self._reads = False
        read = [module.router_sums for module in self._routers]
        for module in self._routers:
            module.router_sums = None
        assert None not in read, f"{len(read) - read.count(None)} routers ran, of {len(self.layers)}"
        probabilities, log_z_squared, tokens = (torch.stack(layers) for layers in zip(*read, strict=True))
        return RouterSums(probabilities, log_z_squared, tokens)

    def _after_router(self, module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._weights_N is None:
            return
        logits_NE, _, ids_NK = router_outputs(output)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._differentiable):
            wide_NE = logits_NE.float()
            # A row and not a vector: torch would squeeze the product in place, which selective checkpointing refuses.
            probabilities_E = (self._weights_N.unsqueeze(0) @ wide_NE.softmax(dim=-1)).squeeze(0)
            log_z_squared = self._weights_N @ wide_NE.logsumexp(dim=-1).square()
        with torch.no_grad():
            counted_NK = (self._weights_N > 0).to(torch.float32).unsqueeze(1).expand_as(ids_NK)
            tokens_E = torch.zeros_like(probabilities_E).index_add_(0, ids_NK.flatten(), counted_NK.flatten())
        if self._reads:
            # An attribute and no list: torch.compile would compile each layer for another length of the list.
            module.router_sums = (probabilities_E, log_z_squared, tokens_E)


def _release_graph(router: Any, *_: Any) -> None:
    """Detaches a router's sums after a pass without gradients: a compiled layer's have them (`models.layers`)."""
    if not torch.is_grad_enabled() and router.router_sums is not None:
        router.router_sums = tuple(sums.detach() for sums in router.router_sums)
