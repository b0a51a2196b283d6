"""Room `model`: how much each part of a model does on some text, by its activations. It knows no sizes to prune to.

Muralidharan et al., Minitron (2407.14679), section 2.2: of each sequence the mean of the activations' absolute values,
of all sequences the L2 norm of these, the best pair in their table 13.

Legend: B sequences, S tokens of a sequence, E hidden channels, I neurons of an MLP, H heads, W channels of whatever.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megadistill.errors import OperatorFault, UserError
from megadistill.models.families import decoder, head_dim, reading
from megadistill.types import IGNORED_LABEL, TokenBatch


@dataclass(frozen=True)
class Importance:
    """Scores, the higher the more a part does; float64 on the host."""

    hidden: Tensor
    """[E]: of what each RMSNorm over the hidden channels gives, in all layers and at the end, added up."""
    neurons: list[Tensor]
    """Of each layer [I]: of what the down projection reads."""
    heads: list[Tensor]
    """Of each layer [H]: of the L2 norm of what a head gives."""
    layers: Tensor
    """[layers]: block importance, 1 - cos(what the layer reads, what it gives), a token's mean (2403.03853)."""
    shares: dict[str, Tensor]
    """By the name of each RMSNorm over more than one head [W]: a channel's share of the square of what it reads."""
    sequences: int
    tokens: int
    """That were counted: those with a label."""


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Iterable[TokenBatch]) -> Importance:
    """Runs the model's body over the batches, on its own device.

    How the sequences are cut into batches changes rounding alone. Memory: the model, a forward pass, and a few copies
    of the widest activation.

    Raises:
        UserError: no token has a label. OperatorFault: an activation is not finite.
    """
    tally = _Tally()
    sequences = 0
    with _watched(model, tally):
        for batch in batches:
            batch = batch.to(model.device)
            tally.counted_BS = batch.labels != IGNORED_LABEL
            decoder(model)(**reading(batch.tokens, batch.positions))
            sequences += len(batch)
            tally.tokens += batch.valid_tokens
    if tally.tokens == 0:
        raise UserError("the calibration sequences hold no token with a label: give other data")
    layers = range(model.config.num_hidden_layers)
    found = Importance(
        hidden=torch.stack([tally.score(name) for name in tally.squares if name in tally.over_hidden]).sum(dim=0),
        neurons=[tally.score(f"model.layers.{layer}.mlp.down_proj") for layer in layers],
        heads=[tally.score(f"model.layers.{layer}.self_attn.o_proj") for layer in layers],
        layers=torch.stack([tally.sums[f"model.layers.{layer}"] for layer in layers]) / tally.tokens,
        shares={name: _shares(total) for name, total in tally.sums.items() if name.endswith("norm")},
        sequences=sequences,
        tokens=tally.tokens,
    )
    scores = [found.hidden, found.layers, *found.neurons, *found.heads, *found.shares.values()]
    if not all(bool(score.isfinite().all()) for score in scores):
        raise OperatorFault("the teacher's activations are not finite: check its weights")
    return found


class _Tally:
    """Sums over the batches so far, by the name of what was looked at."""

    def __init__(self) -> None:
        self.counted_BS = torch.empty(0)
        """Which tokens of the batch at hand count."""
        self.tokens = 0
        self.squares: dict[str, Tensor] = {}
        """Over sequences, of the square of the mean over the sequence."""
        self.sums: dict[str, Tensor] = {}
        """Over tokens."""
        self.over_hidden: set[str] = set()
        """Which of `squares` are norms over the hidden channels."""

    def add_magnitudes(self, name: str, x_BSW: Tensor) -> None:
        """One activation a token and channel: see `Importance`."""
        weights_BS = self.counted_BS.float() / self.counted_BS.sum(dim=1, keepdim=True).clamp_min(1)
        means_BW = torch.einsum("bs,bsw->bw", weights_BS, x_BSW.float().abs())
        _add(self.squares, name, means_BW.double().square().sum(dim=0))

    def add_tokens(self, name: str, x_BSW: Tensor) -> None:
        """Over the tokens that count."""
        _add(self.sums, name, x_BSW[self.counted_BS].double().sum(dim=0))

    def score(self, name: str) -> Tensor:
        return self.squares[name].sqrt()


def _add(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    more = more.cpu()
    sums[name] = sums[name] + more if name in sums else more


def _shares(totals_W: Tensor) -> Tensor:
    """Where a norm reads zeros a token has no shares: of a padding id's embedding, or behind a layer that is silent."""
    total = totals_W.sum()
    return torch.full_like(totals_W, 1 / len(totals_W)) if total == 0 else totals_W / total


@contextmanager
def _watched(model: PreTrainedModel, tally: _Tally) -> Iterator[None]:
    """The model with its norms, down projections, head outputs and layers told to `tally`."""
    size = head_dim(model.config)

    def norm(name: str, over_hidden: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], given: Tensor) -> None:
            squares = args[0].float().square()
            tally.add_tokens(
                name, squares / squares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            )
            if over_hidden:
                tally.over_hidden.add(name)
                tally.add_magnitudes(name, given)

        return hook

    def read_by(name: str, x: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, args: tally.add_magnitudes(name, x(args[0]))

    def layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keys: dict[str, Any], given: Any) -> None:
            read = args[0] if args else keys["hidden_states"]
            given = given[0] if isinstance(given, tuple) else given
            cosine_BS = torch.nn.functional.cosine_similarity(read.float(), given.float(), dim=-1)
            tally.add_tokens(name, 1 - cosine_BS)

        return hook

    handles = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == "down_proj":
            handles.append(module.register_forward_pre_hook(read_by(name, lambda x: x)))
        elif leaf == "o_proj":
            heads = read_by(name, lambda x: x.float().view(*x.shape[:-1], -1, size).norm(dim=-1))
            handles.append(module.register_forward_pre_hook(heads))
        elif leaf in ("q_norm", "k_norm") and _width(module) > size:  # over all heads, as OLMo 2 has it
            handles.append(module.register_forward_hook(norm(name, over_hidden=False)))
        elif leaf.endswith("norm") and leaf not in ("q_norm", "k_norm"):
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
