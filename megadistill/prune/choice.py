"""Choice of the channels, neurons, heads and layers that stay in a pruned model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.models.families import ModelConfig
from megadistill.prune.importance import Importance
from megadistill.prune.sizes import Sizes


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
