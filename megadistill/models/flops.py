"""Parameters and FLOPs of a model, counted on meta.

Legend: B body parameters, A those of them that a token passes through (all, but in a mixture of experts), V vocabulary,
d width, L layers, s sequence length, a attention width (heads × head size).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Size
from transformers import PretrainedConfig

from megadistill.models.attention.choice import query_width, value_width
from megadistill.models.attention.masks import INDEXED_KINDS
from megadistill.models.configs.unequal_layers import layer_config
from megadistill.models.experts import experts_per_token, is_stacked
from megadistill.models.families import EMBEDDING, HEAD, has_experts, parameter_shapes
from megadistill.models.forward.per_layer_inputs import TABLE, is_by_layer

LAYERS = "model.layers."

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "hybrid")
"""Kinds of layers with attention, whose keys all queries may see as far as they are counted."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model. A tied head is the embedding, so it counts 0."""

    body: int
    """B: all but embedding and head."""
    active_body: int
    """A: parameters that a token is multiplied by, from which FLOPs are counted."""
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return self.body + self.embedding + self.head


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token's forward pass; a backward pass costs twice as much."""

    body: int
    """2A: a multiplication and an addition for each active body parameter."""
    head: int
    """2Vd: tied or not."""
    attention: int
    """2Lsa: scores and values, over the s/2 positions that a token sees on average.

    Of linear attention, 6 operations for each number of the state: it is read, corrected and read again; of Mamba 4.
    """

    @property
    def forward(self) -> int:
        return self.body + self.head + self.attention


def parameter_counts(config: PretrainedConfig) -> ParameterCounts:
    """Counted from the real model, built on meta: no weights are allocated."""
    shapes = parameter_shapes(config)
    embedding, head = shapes.pop(EMBEDDING), shapes.pop(HEAD, None)
    return ParameterCounts(
        body=sum(shape.numel() for shape in shapes.values()),
        active_body=sum(_active(config, name, shape) for name, shape in shapes.items()),
        embedding=embedding.numel(),
        head=head.numel() if head is not None else 0,
    )


def layer_costs(config: PretrainedConfig) -> list[int]:
    """Active parameters of each layer, which its FLOPs a token are twice of, attention's scores aside."""
    return _by_layer(config, partial(_active, config))


def layer_parameters(config: PretrainedConfig) -> list[int]:
    """Parameters of each layer, with those of all experts: a stage's memory is counted from them."""
    return _by_layer(config, lambda name, shape: shape.numel())


def _by_layer(config: PretrainedConfig, count: Callable[[str, Size], int]) -> list[int]:
    counts = [0] * config.num_hidden_layers
    for name, shape in parameter_shapes(config).items():
        if name.startswith(LAYERS):
            counts[int(name.removeprefix(LAYERS).split(".")[0])] += count(name, shape)
        elif is_by_layer(name):
            share = count(name, shape) // config.num_hidden_layers
            counts = [each + share for each in counts]
    return counts


def _active(config: PretrainedConfig, name: str, shape: Size) -> int:
    """Elements of a parameter that a token is multiplied by: of a mixture's fused experts, those of its own ones.

    None of a table that is looked up.
    """
    if name == TABLE:
        return 0
    stacked = has_experts(config) and is_stacked(name)
    return shape.numel() // shape[0] * experts_per_token(config) if stacked else shape.numel()


def flops_per_token(config: PretrainedConfig, sequence_length: int) -> Flops:
    """`fwd = 2A + 2Vd + 2Lsa`: PaLM's count (2204.02311, appendix B), with causal attention as half of full attention.

    A sliding window, a chunk, and keys that an indexer chose count as full causal attention, as do an indexer's scores.
    Of latent attention, a is the mean of the widths of scores and values. Linear attention counts by its state, not by
    s.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    widths = 0
    for layer, kind in enumerate(kinds):
        if kind in (*_ATTENTION, *INDEXED_KINDS):
            own = layer_config(config, layer)
            widths += own.num_attention_heads * (query_width(own) + value_width(own))
        if kind in INDEXED_KINDS and (getattr(config, "indexer_types", None) or ["full"] * len(kinds))[layer] == "full":
            widths += config.index_n_heads * config.index_head_dim
    return Flops(
        body=2 * parameter_counts(config).active_body,
        head=2 * config.vocab_size * config.hidden_size,
        attention=sequence_length * widths
        + sum(kind in ("linear_attention", "hybrid") for kind in kinds) * _state_flops(config),
    )


def _state_flops(config: PretrainedConfig) -> int:
    """FLOPs of a token in a layer of linear attention, or of Mamba: those with its state."""
    if hasattr(config, "linear_num_value_heads"):
        return int(6 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim)
    if hasattr(config, "ssm_state_size"):
        return int(4 * config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size)
    if hasattr(config, "mamba_d_state"):
        return int(4 * config.mamba_n_heads * config.mamba_d_head * config.mamba_d_state)
    return 0
