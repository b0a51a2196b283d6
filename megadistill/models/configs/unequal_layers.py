"""Layers of one model that differ in more than their kind: heads of other widths, keys and values that layers share.

Gemma 4's layers of full attention have wider heads, and fewer of them for keys, than those with windows. The last
layers of Gemma 3n and Gemma 4 compute no keys and values: each takes those of the last layer of its kind that does. Of
GLM 5, layers may take the keys that an earlier layer's indexer chose.
"""

from collections.abc import Sequence
from typing import Any, Final

from transformers import PretrainedConfig

from megadistill.errors import UserError

_BY_KIND: Final = ("head_dim", "num_key_value_heads")
"""Keys that may have a value of their own for all layers of a kind."""

_MAX_SIZE: Final = 10**5
"""Largest size of a head, and largest number of heads."""


def layer_config(config: PretrainedConfig, layer: int) -> Any:
    """The config as this layer reads it."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def layer_configs(config: PretrainedConfig) -> list[Any]:
    """The config as its layers read it: one for each kind of layer, or for all where they are alike."""
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    return [layer_config(config, config.layer_types.index(kind)) for kind in kinds] or [config]


def refuse_unequal_sizes(config: PretrainedConfig, what: str) -> None:
    """Refuses sizes by layer other than those of heads, or of layers of one kind that differ.

    Raises:
        UserError: naming the key; `what` is the config.
    """
    layers, first = config.num_hidden_layers, first_sharing_layer(config)
    if first < layers and (first < 1 or {*config.layer_types[first:]} - {*config.layer_types[:first]}):
        raise UserError(
            f"{what}: num_kv_shared_layers is {config.num_kv_shared_layers}; of {layers} layers, a first one of each "
            "kind must compute keys and values"
        )
    if not getattr(config, "is_heterogeneous", False):
        return
    for kind in dict.fromkeys(config.layer_types):
        given = [_overrides(config).get(layer, {}) for layer, each in enumerate(config.layer_types) if each == kind]
        for key in {key for each in given for key in each}:
            values = {str(each.get(key)) for each in given}
            value = given[0].get(key)
            if key not in _BY_KIND or len(values) > 1 or type(value) is not int or not 1 <= value <= _MAX_SIZE:
                raise UserError(
                    f"{what}: per_layer_config has {key} of {', '.join(sorted(values))[:100]} for layers of {kind}; it "
                    f"may have {' and '.join(_BY_KIND)}, from 1 to {_MAX_SIZE}, the same for all layers of a kind"
                )


def _overrides(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """Layer -> its sizes that are not the model's."""
    return {int(layer): each for layer, each in (config.to_dict().get("per_layer_config") or {}).items()}


def set_heads_of_keys(config: PretrainedConfig, heads: int) -> None:
    """Sets the number of heads of keys where layers have one of their own."""
    overrides = _overrides(config) if getattr(config, "is_heterogeneous", False) else {}
    if overrides:
        config.per_layer_config = {
            layer: {key: heads if key == "num_key_value_heads" else value for key, value in each.items()}
            for layer, each in overrides.items()
        }


def keep_unequal_layers(config: PretrainedConfig, layers: Sequence[int]) -> None:
    """`keep_layers` for what this module is about; call it while the config is still that of all layers.

    A layer that stays without the one whose keys and values it takes computes some of its own: so it can be counted.
    """
    overrides = _overrides(config) if getattr(config, "is_heterogeneous", False) else {}
    if overrides:
        config.per_layer_config = None
    remaining = {place: dict(overrides[layer]) for place, layer in enumerate(layers) if layer in overrides}
    first = first_sharing_layer(config)
    sharing = [layer for layer in layers if layer >= first]
    if sharing:
        kinds = {config.layer_types[layer] for layer in layers}
        has_sources = kinds == {config.layer_types[layer] for layer in layers if layer < first}
        if not has_sources and getattr(config, "use_double_wide_mlp", False):
            config.intermediate_size *= 2
        sharing = sharing if has_sources else []
    if hasattr(config, "num_kv_shared_layers"):
        config.num_kv_shared_layers = len(sharing)
    config.num_hidden_layers = len(layers)
    if overrides:
        config.per_layer_config = remaining


def first_sharing_layer(config: PretrainedConfig) -> int:
    """The first layer that computes no keys and values; the number of layers where all do."""
    return int(config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0))


def first_layers(config: PretrainedConfig) -> list[int]:
    """The layers that a stage may begin with: a stage hands on hidden states alone, so what layers share stays in one.

    Ascending, from 0.
    """
    layers = range(config.num_hidden_layers)
    indexers = getattr(config, "indexer_types", None)
    if indexers:
        return [layer for layer in layers if indexers[layer] == "full"]
    first = first_sharing_layer(config)
    if first < config.num_hidden_layers:
        kinds = config.layer_types[:first]
        shared = set(config.layer_types[first:])
        last_source = min(first - 1 - kinds[::-1].index(kind) for kind in shared)
        return [layer for layer in layers if layer <= last_source]
    return list(layers)
