"""Room `model`: which channels, neurons, heads and layers a pruned model keeps. It knows no weights."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megadistill.prune.importance import Importance
from megadistill.prune.sizes import Sizes


@dataclass(frozen=True)
class Kept:
    """Indices into the whole model, ascending."""

    hidden: list[int]
    layers: list[int]
    groups: list[list[int]]
    """Of each kept layer: the key-value groups, each with all of its query heads."""
    neurons: list[list[int]]
    """Of each kept layer."""


def choose(importance: Importance, config: PretrainedConfig, sizes: Sizes) -> Kept:
    """What scores highest; of equals, what comes first.

    The hidden channels are the same in all layers, which add to one stream; neurons and groups are chosen in each layer
    by itself. A group scores what its heads do together. All is measured on the whole model (Minitron's single shot).
    """
    layers = _highest(importance.layers, sizes.layers)
    group = config.num_attention_heads // config.num_key_value_heads
    by_group = [heads.view(-1, group).sum(dim=1) for heads in importance.heads]
    return Kept(
        hidden=_highest(importance.hidden, sizes.hidden_size),
        layers=layers,
        groups=[_highest(by_group[layer], sizes.heads // group) for layer in layers],
        neurons=[_highest(importance.neurons[layer], sizes.intermediate_size) for layer in layers],
    )


def _highest(scores: Tensor, count: int) -> list[int]:
    indices: list[int] = torch.sort(scores, descending=True, stable=True).indices[:count].sort().values.tolist()
    return indices
