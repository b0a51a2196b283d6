"""Inputs of each layer's own, from the tokens: Gemma 3n and 4.

A second table has a row for each id with some numbers for each layer; to them come as many that are projected from the
embedding. They follow from the tokens alone, so a stage computes those of its own layers: it holds the embedding, its
layers' columns of the table and their rows of the projection.

Legend: B sequences, S tokens of a sequence, L layers of a stage, P numbers of a layer's input, E width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from transformers import PretrainedConfig

TABLE: Final = "model.embed_tokens_per_layer.weight"
"""[ids, all layers · P]"""

_PROJECTION: Final = "model.per_layer_model_projection.weight"
"""[all layers · P, E]"""

NORM: Final = "model.per_layer_projection_norm.weight"
"""[P], of all layers alike."""


@dataclass(frozen=True)
class LayerPart:
    """The part of a whole model's tensor that belongs to a stage's layers."""

    axis: int
    start: int
    stop: int


def has_per_layer_inputs(config: PretrainedConfig) -> bool:
    """Whether layers read inputs of their own beside hidden states."""
    return bool(getattr(config, "hidden_size_per_layer_input", None))


def is_by_layer(name: str) -> bool:
    """Whether a parameter outside of the layers has equal parts for all of them."""
    return name in (TABLE, _PROJECTION)


def layer_part(config: PretrainedConfig, name: str, layers: Sequence[int]) -> LayerPart | None:
    """The part of the tensor `name` of the whole model that a stage of these layers has; None: all of it."""
    if not has_per_layer_inputs(config) or not is_by_layer(name):
        return None
    width = config.hidden_size_per_layer_input
    return LayerPart(1 if name == TABLE else 0, layers[0] * width, (layers[-1] + 1) * width)


def take_given_inputs(decoder: Any) -> None:
    """Has a stage that reads hidden states take its layers' inputs as they are, from `per_layer_inputs`."""
    decoder.project_per_layer_inputs = _given


def _given(hidden_BSE: Tensor, inputs_BSLP: Tensor) -> Tensor:
    return inputs_BSLP


def per_layer_inputs(decoder: Any, tokens_BS: Tensor) -> Tensor:
    """[B, S, L, P]: the inputs of the layers of a stage after `take_given_inputs`."""
    lookup = decoder.get_per_layer_inputs
    none_of_embeddings = (None,) * (len(inspect.signature(lookup).parameters) - 1)  # Gemma 4 could find ids by them
    of_tokens_BSLP = lookup(tokens_BS, *none_of_embeddings)
    inputs_BSLP: Tensor = type(decoder).project_per_layer_inputs(
        decoder, decoder.embed_tokens(tokens_BS), of_tokens_BSLP
    )
    return inputs_BSLP
