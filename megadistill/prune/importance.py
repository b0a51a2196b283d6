"""Importance of each part of a model, by its activations on some text, and the choice of the parts that stay.

Muralidharan et al., Minitron (2407.14679), section 2.2: the mean of the activations' absolute values over a sequence,
and the L2 norm of these over all sequences, the best pair in their table 13.

Legend: B sequences, S tokens of a sequence, E hidden channels, I neurons of an MLP, H heads, W channels of whatever.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadistill.errors import OperatorFault, UserError
from megadistill.models.families import Model, ModelConfig, decoder, forward_inputs, head_dim
from megadistill.prune.sizes import Sizes
from megadistill.types import IGNORED_LABEL, TokenBatch

HEAD_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
"""Norms of queries and keys: within each head, or over all of them."""


@dataclass(frozen=True)
class Importance:
    """Scores of the parts, higher for more important ones; float64 on the host."""

    hidden: Tensor
    """[E]: scores of the outputs of all RMSNorms over the hidden channels, added up."""
    neurons: list[Tensor]
    """[I] for each layer: scores of the inputs of the down projection."""
    heads: list[Tensor]
    """[H] for each layer: scores of the L2 norms of the heads' outputs."""
    layers: Tensor
    """[layers]: block importance, 1 - cos(input, output), averaged over tokens (2403.03853)."""
    shares: dict[str, Tensor]
    """Name of an RMSNorm over more than one head -> [W]: each channel's share of the square of its input."""
    sequences: int
    tokens: int
    """Tokens that were counted: those with a label."""


@torch.no_grad()
def measure_importance(model: Model, batches: Iterable[TokenBatch]) -> Importance:
    """Runs the model's body over the batches, on its own device.

    The batch size changes rounding alone. Memory: the model, a forward pass, and a few copies
    of the widest activation.

    Raises:
        UserError: no token has a label. OperatorFault: an activation is not finite.
    """
    sums, inner = _Accumulator(), decoder(model)
    sequences = 0
    with _hooked(model, sums):
        for batch in batches:
            batch = batch.to(model.device)
            sums.counted_BS = batch.labels != IGNORED_LABEL
            inner(**forward_inputs(inner, batch.tokens, batch.positions))
            sequences += len(batch)
            sums.tokens += batch.valid_tokens
    if sums.tokens == 0:
        raise UserError("the calibration sequences hold no token with a label: give other data")
    layers = range(model.config.num_hidden_layers)
    importance = Importance(
        hidden=torch.stack([sums.score(name) for name in sums.squares if name in sums.over_hidden]).sum(dim=0),
        neurons=[sums.score(f"model.layers.{layer}.mlp.down_proj") for layer in layers],
        heads=[sums.score(f"model.layers.{layer}.self_attn.o_proj") for layer in layers],
        layers=torch.stack([sums.totals[f"model.layers.{layer}"] for layer in layers]) / sums.tokens,
        shares={name: _shares(total) for name, total in sums.totals.items() if name.endswith("norm")},
        sequences=sequences,
        tokens=sums.tokens,
    )
    scores = [
        importance.hidden,
        importance.layers,
        *importance.neurons,
        *importance.heads,
        *importance.shares.values(),
    ]
    if not all(bool(score.isfinite().all()) for score in scores):
        raise OperatorFault("the teacher's activations are not finite: check its weights")
    return importance


class _Accumulator:
    """Sums over the batches so far, by the name of the module."""

    def __init__(self) -> None:
        self.counted_BS = torch.empty(0)
        """Mask of the tokens of the current batch that are counted."""
        self.tokens = 0
        self.squares: dict[str, Tensor] = {}
        """Sums over sequences of the square of the mean over the sequence."""
        self.totals: dict[str, Tensor] = {}
        """Sums over tokens."""
        self.over_hidden: set[str] = set()
        """Names in `squares` of norms over the hidden channels."""

    def add_magnitudes(self, name: str, x_BSW: Tensor) -> None:
        """Adds activations for the scores of `Importance`."""
        weights_BS = self.counted_BS.float() / self.counted_BS.sum(dim=1, keepdim=True).clamp_min(1)
        means_BW = torch.einsum("bs,bsw->bw", weights_BS, x_BSW.float().abs())
        _add(self.squares, name, means_BW.double().square().sum(dim=0))

    def add_tokens(self, name: str, x_BSW: Tensor) -> None:
        """Adds values of the counted tokens."""
        _add(self.totals, name, x_BSW[self.counted_BS].double().sum(dim=0))

    def score(self, name: str) -> Tensor:
        return self.squares[name].sqrt()


def _add(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    more = more.cpu()
    sums[name] = sums[name] + more if name in sums else more


def _shares(totals_W: Tensor) -> Tensor:
    """Shares of the total; equal ones if a norm reads only zeros, as after a layer that outputs zeros."""
    total = totals_W.sum()
    return torch.full_like(totals_W, 1 / len(totals_W)) if total == 0 else totals_W / total


@contextmanager
def _hooked(model: Model, sums: _Accumulator) -> Iterator[None]:
    """Adds the activations of the model's norms, down projections, heads and layers to `sums`."""
    size = head_dim(model.config)

    def norm(name: str, over_hidden: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            squares = args[0].float().square()
            sums.add_tokens(
                name, squares / squares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            )
            if over_hidden:
                sums.over_hidden.add(name)
                sums.add_magnitudes(name, output)

        return hook

    def input_of(name: str, x: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, args: sums.add_magnitudes(name, x(args[0]))

    def layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keys: dict[str, Any], output: Any) -> None:
            x = args[0] if args else keys["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            cosine_BS = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
            sums.add_tokens(name, 1 - cosine_BS)

        return hook

    handles = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == "down_proj":
            handles.append(module.register_forward_pre_hook(input_of(name, lambda x: x)))
        elif leaf == "o_proj":
            heads = input_of(name, lambda x: x.float().view(*x.shape[:-1], -1, size).norm(dim=-1))
            handles.append(module.register_forward_pre_hook(heads))
        elif leaf in HEAD_NORMS and _width(module) > size:  # over all heads, as OLMo 2 has it
            handles.append(module.register_forward_hook(norm(name, over_hidden=False)))
        elif leaf.endswith("norm") and leaf not in HEAD_NORMS:
            handles.append(module.register_forward_hook(norm(name, over_hidden=True)))
        elif name.startswith("model.layers.") and leaf.isdigit():
            handles.append(module.register_forward_hook(layer(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _width(module: nn.Module) -> int:
    return module.get_parameter("weight").numel()


@dataclass(frozen=True)
class PruningChoice:
    """Ascending indices into the whole model of the parts that stay."""

    hidden: list[int]
    """Channels of the hidden state."""
    layers: list[int]
    groups: list[list[int]]
    """Key-value groups of each remaining layer, each with all of its query heads."""
    neurons: list[list[int]]
    """Neurons of the MLP of each remaining layer."""


def choose(importance: Importance, config: ModelConfig, sizes: Sizes) -> PruningChoice:
    """The parts with the highest scores; of equal scores, the first.

    Hidden channels are the same in all layers, which add to one residual stream; neurons and groups are chosen layer by
    layer. A group has the sum of its heads' scores. All scores are of the whole model (Minitron's single shot).
    """
    layers = _highest(importance.layers, sizes.layers)
    group = config.num_attention_heads // config.num_key_value_heads
    by_group = [heads.view(-1, group).sum(dim=1) for heads in importance.heads]
    return PruningChoice(
        hidden=_highest(importance.hidden, sizes.hidden_size),
        layers=layers,
        groups=[_highest(by_group[layer], sizes.heads // group) for layer in layers],
        neurons=[_highest(importance.neurons[layer], sizes.intermediate_size) for layer in layers],
    )


def _highest(scores: Tensor, count: int) -> list[int]:
    indices: list[int] = torch.sort(scores, descending=True, stable=True).indices[:count].sort().values.tolist()
    return indices
