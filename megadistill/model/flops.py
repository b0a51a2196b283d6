"""Room `model`: parameters and FLOPs of a model, counted on meta. It knows no hardware and no schedule.

Legend: B body parameters, V vocabulary, d width, L layers, s sequence length, a attention width (heads × head size).
"""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from megadistill.model.families import EMBEDDING, HEAD, head_dim, parameter_shapes


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model. A tied head is the embedding, so it counts 0."""

    body: int
    """B: all but embedding and head."""
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return self.body + self.embedding + self.head


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token's forward pass; a backward pass costs twice as much."""

    body: int
    """2B: a multiplication and an addition for each body parameter."""
    head: int
    """2Vd: tied or not."""
    attention: int
    """2Lsa: scores and values, over the s/2 positions that a token sees on average."""

    @property
    def forward(self) -> int:
        return self.body + self.head + self.attention


def parameter_counts(config: PretrainedConfig) -> ParameterCounts:
    """Counted from the real model, built on meta: no weights are allocated."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    embedding, head = sizes.pop(EMBEDDING), sizes.pop(HEAD, 0)
    return ParameterCounts(body=sum(sizes.values()), embedding=embedding, head=head)


def flops_per_token(config: PretrainedConfig, sequence_length: int) -> Flops:
    """`fwd = 2B + 2Vd + 2Lsa`: PaLM's count (2204.02311, appendix B), with causal attention as half of full attention.

    A sliding window counts as full causal attention.
    """
    attention_width = config.num_attention_heads * head_dim(config)
    return Flops(
        body=2 * parameter_counts(config).body,
        head=2 * config.vocab_size * config.hidden_size,
        attention=2 * config.num_hidden_layers * sequence_length * attention_width,
    )
