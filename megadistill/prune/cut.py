"""Parameters of a pruned model, cut out of the whole model's files.

An RMSNorm divides by the root of a mean over all channels, which differs with fewer channels. Its weight is multiplied
by sqrt(n f / n'), with n and n' channels before and after and f the share of the square in the remaining ones, which
keeps its typical output; that is exact where the other channels are zero. Gemma multiplies embeddings by sqrt(n), so
its embedding is scaled for the smaller n', and where that is the head as well, the last norm is scaled back.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megadistill.models.families import EMBEDDING, ModelConfig, build_decoder, family, head_dim, parameter_shapes
from megadistill.models.flops import LAYERS
from megadistill.models.hf_export import NamedReader
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.models.partition import whole_name
from megadistill.models.weights import read_parameter
from megadistill.prune.importance import HEAD_NORMS, PruningChoice

LAST_NORM = "model.norm.weight"

VOCABULARY, HIDDEN, NEURONS, HEADS, GROUPS = "vocabulary", "hidden", "neurons", "heads", "groups"
GATES_AND_NEURONS, HEADS_AND_GROUPS = "gates, then neurons", "heads, then groups of keys, then of values"

AXES: Mapping[str, tuple[str, ...]] = {
    "embed_tokens": (VOCABULARY, HIDDEN),
    "lm_head": (VOCABULARY, HIDDEN),
    "q_proj": (HEADS, HIDDEN),
    "k_proj": (GROUPS, HIDDEN),
    "v_proj": (GROUPS, HIDDEN),
    "o_proj": (HIDDEN, HEADS),
    "qkv_proj": (HEADS_AND_GROUPS, HIDDEN),
    "gate_up_proj": (GATES_AND_NEURONS, HIDDEN),
    "gate_proj": (NEURONS, HIDDEN),
    "up_proj": (NEURONS, HIDDEN),
    "down_proj": (HIDDEN, NEURONS),
    "q_norm": (HEADS,),
    "k_norm": (GROUPS,),
}
"""Axes of each matrix of a layer; a bias has the first of them, and any other norm HIDDEN."""


def pruned_tensors(
    weights: SafetensorsFolder,
    config: ModelConfig,
    small: ModelConfig,
    choice: PruningChoice,
    shares: Mapping[str, Tensor],
) -> Iterator[NamedReader]:
    """Each parameter of the pruned model of config `small`: its name, its shape, and a function that reads and cuts it.

    `shares` as in `Importance`. One whole parameter is in memory while it is cut.
    """
    shapes = parameter_shapes(config)
    growth = _embedding_growth(config, small)
    for name, shape in parameter_shapes(small).items():
        source = whole_name(name, choice.layers)
        axes = _axes(source, shapes[source], head_dim(config))
        indices = [_indices(axis, name, config, choice) for axis in axes]
        gain = growth if name == EMBEDDING else 1.0
        is_norm = source.removesuffix(".weight") in shares
        if is_norm:
            (index,) = indices
            gain = _norm_gain(shares[source.removesuffix(".weight")], index)
        if name == LAST_NORM and small.tie_word_embeddings:
            gain /= growth
        offset = 1.0 - family(config).norm_init if is_norm else 0.0  # Gemma's norms add 1 to their weight
        yield name, shape, partial(_read, weights, config, source, shapes[source], indices, gain, offset)


def _read(
    weights: SafetensorsFolder,
    config: ModelConfig,
    name: str,
    shape: Sequence[int],
    indices: Sequence[Tensor | None],
    gain: float,
    offset: float,
) -> Tensor:
    """float32: the remaining elements x as (x + offset) gain - offset."""
    parameter = read_parameter(weights, config, name, shape, dtype=torch.float32, device=torch.device("cpu"))
    for dimension, index in enumerate(indices):
        if index is not None:
            parameter = parameter.index_select(dimension, index)
    return parameter if gain == 1.0 else (parameter + offset) * gain - offset


def _embedding_growth(config: ModelConfig, small: ModelConfig) -> float:
    """Factor of the embedding that makes up for the model's own factor of sqrt(width)."""
    if not hasattr(build_decoder(config, layers=range(1)).embed_tokens, "embed_scale"):
        return 1.0
    return math.sqrt(config.hidden_size / small.hidden_size)


def _norm_gain(shares: Tensor, index: Tensor | None) -> float:
    if index is None or len(index) == len(shares):
        return 1.0
    return math.sqrt(len(shares) / len(index) * float(shares[index].sum()))


def _axes(name: str, shape: Sequence[int], size: int) -> tuple[str | None, ...]:
    """Axes of the parameter's dimensions; None: an axis that pruning does not cut."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module in HEAD_NORMS and shape[0] == size:  # within each head
        return (None,)
    if module in AXES:
        return AXES[module][: len(shape)]
    assert module.endswith("norm"), f"{name}: no rule cuts it"
    return (HIDDEN,)


def _indices(axis: str | None, name: str, config: ModelConfig, choice: PruningChoice) -> Tensor | None:
    """Indices that stay of a dimension; None: all. `name` counts the pruned model's layers."""
    if axis is None or axis == VOCABULARY:
        return None
    if axis == HIDDEN:
        return torch.tensor(choice.hidden)
    layer = int(name.removeprefix(LAYERS).partition(".")[0])
    neurons = torch.tensor(choice.neurons[layer])
    if axis == NEURONS:
        return neurons
    if axis == GATES_AND_NEURONS:
        return torch.cat([neurons, neurons + config.intermediate_size])
    of_keys = _rows_of_groups(choice.groups[layer], head_dim(config))
    if axis == GROUPS:
        return of_keys
    heads, keys = (count * head_dim(config) for count in (config.num_attention_heads, config.num_key_value_heads))
    of_queries = _rows_of_groups(choice.groups[layer], heads // config.num_key_value_heads)  # a group's are neighbours
    return of_queries if axis == HEADS else torch.cat([of_queries, of_keys + heads, of_keys + heads + keys])


def _rows_of_groups(groups: Sequence[int], rows: int) -> Tensor:
    """The rows of a matrix that belong to these groups, of `rows` each."""
    return torch.cat([torch.arange(group * rows, (group + 1) * rows) for group in groups])
