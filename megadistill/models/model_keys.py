"""Keys of a model's config: those that decide its computation are read, all others are dropped.

A config.json comes with weights from anywhere, and transformers keeps each of its keys as an attribute. Some name code
(`auto_map`, `custom_pipelines`), some a kernel that transformers would fetch from a hub and import
(`attn_implementation`, `experts_implementation`), some replace methods of its classes (`attribute_map`,
`base_model_tp_plan`) or ask for gigabytes (`num_labels`). So this is a list of what is read, not of what is not.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, Final, get_args

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from megadistill.errors import UserError, nearest
from megadistill.models.multimodal.wrappers import NOT_READ, WRAPPERS
from megadistill.models.quantized.layout import read_quantisation
from megadistill.redaction import printable

_GENERAL = ("architectures", "dtype", "model_type", "transformers_version")
"""Fields that every config of transformers has, of those that a causal decoder has a use for."""

_TRANSLATED = (
    "head_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
)
"""Keys of published configs that transformers reads without declaring them, or translates."""

_REFUSED: Mapping[str, str] = {
    "per_layer_config": (
        "per_layer_config is not supported for this model_type; all its layers must have the same sizes"
    ),
    "transformers_weights": (
        "transformers_weights names another file of weights; rename that file to model.safetensors, and remove the key"
    ),
}
"""Keys that change what transformers computes and that are not supported, with the reason."""

TRANSFORMERS_REFUSES: Final = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
)
"""Errors of transformers where it is given a config of another program, or a damaged one."""

_MAX_WORD = 64
"""Maximum characters of a foreign word in a message."""


def config_class_of(model_type: str) -> type[PretrainedConfig]:
    """The class of transformers for the configs of a supported family."""
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return config_class


def read_keys(config_class: type[PretrainedConfig], more: Collection[str]) -> set[str]:
    """The keys of a config of this class that are read; `more`: those of the family that the class does not declare."""
    general = {field.name for field in fields(PretrainedConfig)}
    own = {field.name for field in fields(config_class)} - general
    aliases = config_class.attribute_map
    return own | {*aliases, *aliases.values(), *_GENERAL, *_TRANSLATED, *more}


def without_idle_window(keys: Mapping[str, Any], config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The keys without a `sliding_window` of 0, which transformers writes of a Qwen 2 mixture without windows."""
    switched = "use_sliding_window" in {field.name for field in fields(config_class)}
    idle = switched and not keys.get("use_sliding_window") and keys.get("sliding_window") == 0
    return {key: value for key, value in keys.items() if not (idle and key == "sliding_window")}


def with_floats(keys: Mapping[str, Any], config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """The keys with `30` as `30.0` where a field of the class is a float: transformers refuses an integer there."""
    kinds = {field.name: {field.type, *get_args(field.type)} for field in fields(config_class)}
    floats = {name for name, kind in kinds.items() if float in kind and int not in kind}
    return {key: float(value) if key in floats and type(value) is int else value for key, value in keys.items()}


def refuse_unsupported(keys: Mapping[str, Any], what: str, more: Collection[str] = ()) -> None:
    """Refuses a config with a key that changes the model in a way that is not supported.

    `more`: keys that its family reads beside those that its class declares.

    Raises:
        UserError: naming it; `what` is the config.
    """
    for key, reason in _REFUSED.items():
        if keys.get(key) not in (None, {}) and not (key == "per_layer_config" and key in more):
            raise UserError(f"{what}: {reason}")
    read_quantisation(keys.get("quantization_config"), what)
    # "vision" says what images see in each other, of which there are none.
    if keys.get("is_causal") is False or keys.get("use_bidirectional_attention") not in (None, False, "vision"):
        name = "is_causal is false" if keys.get("is_causal") is False else "use_bidirectional_attention is set"
        raise UserError(f"{what}: {name}; a language model must not see the next token")


def refuse_rope(config: PretrainedConfig, what: str, *, head: int, partial: bool, keys: Collection[str]) -> None:
    """Refuses rotary embeddings that the family does not have, or that its forward pass cannot compute.

    Args:
        head: columns of a head.
        partial: whether the family turns a part of each head; others have no such factor, and some ignore it.
        keys: of numbers that `rope_parameters` must have.

    Raises:
        UserError: naming the number.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # Olmo 3 keeps a factor that its `rope_parameters` get when a rotary embedding is built.
    later = {"partial_rotary_factor": getattr(config, "partial_rotary_factor", None)}
    for parameters in (later, rope, *(each for each in rope.values() if isinstance(each, dict))):
        factor = parameters.get("partial_rotary_factor")
        factor = 1 if factor is None else factor
        if factor != 1 and not partial:
            raise UserError(
                f"{what}: partial_rotary_factor is {factor!r}; a {config.model_type} model turns whole heads"
            )
        if not isinstance(factor, int | float) or not 0 < factor <= 1 or int(head * factor) % 2 or head * factor < 2:
            raise UserError(
                f"{what}: partial_rotary_factor is {factor!r} of heads of {head} columns; rotary embeddings turn "
                "pairs: give a factor up to 1 that makes it an even number of columns"
            )
        if parameters.get("rope_type") == "longrope":
            _refuse_factors(parameters, what, pairs=int(head * factor) // 2)
    for key in keys:
        if not isinstance(rope.get(key), int | float):
            raise UserError(
                f"{what}: rope_parameters has no number {key!r}, by which a {config.model_type} model scales its "
                "queries: take the config.json that came with the model"
            )


def _refuse_factors(parameters: Mapping[str, Any], what: str, *, pairs: int) -> None:
    """Longrope has a factor for each pair of columns: of short rows, and of long ones, which are looked up later."""
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if not isinstance(factors, list) or len(factors) != pairs or not {*map(type, factors)} <= {int, float}:
            held = f"{len(factors)} values" if isinstance(factors, list) else type(factors).__name__
            raise UserError(
                f"{what}: {name} of longrope has {held}; a head turns {pairs} pairs of columns: give a number for each"
            )


def refused_by_transformers(error: Exception, model_type: str, what: str) -> UserError:
    """The error for a config that transformers ends with one of `TRANSFORMERS_REFUSES`."""
    reason = " ".join(str(error.__cause__ or error).split())
    return UserError(f"{what}: transformers refuses this {model_type} config: {reason}")


def refuse_unknown(keys: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Refuses a mapping with a key that is not read: a typing mistake, which transformers would keep in silence.

    Raises:
        UserError: naming the first.
    """
    for key in keys:
        if key not in known:
            raise UserError(f"{what}: a {keys['model_type']} model has no {key!r}{nearest(str(key), sorted(known))}")


def unsupported_type(keys: Mapping[str, Any], supported: Collection[str], what: str) -> UserError:
    """The error for a config of another architecture: what is supported, and the way to it where there is one.

    A name that is close to a supported one is a typing mistake only where transformers has no such architecture.
    """
    model_type = keys.get("model_type")
    quoted = repr(printable(model_type[:_MAX_WORD])) if isinstance(model_type, str) else type(model_type).__name__
    if model_type is None:
        quoted = "None"
    message = f"{what}: model_type is {quoted}; supported are {', '.join(supported)}"
    text = keys.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if isinstance(model_type, str) and model_type in NOT_READ:
        message += f". A {model_type} folder is not read: {NOT_READ[model_type]}"
    elif isinstance(inner, str) and inner in supported:
        read = ", ".join(sorted(WRAPPERS))
        message += f". Its language model is a {inner} model; such a model is read from a folder of {read}"
    elif isinstance(inner, str) and isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        message += f". Its language model is a {printable(inner[:_MAX_WORD])} model"
    elif isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        message += nearest(model_type[:_MAX_WORD], supported)
    return UserError(message)
