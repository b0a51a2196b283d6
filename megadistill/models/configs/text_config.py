"""The config of a multimodal model's language model, from the folder's config.json.

Read are multimodal models whose language model computes on text what a supported family computes. The rotary embedding
of Qwen VL turns by three positions, of time, height and width (m-rope): on text all three are the place of the token,
so each pair of a head turns as in plain Qwen.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import CONFIG_MAPPING

from megadistill.io import parse_json
from megadistill.models.config_bounds import refuse_extreme_numbers
from megadistill.models.hf_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from megadistill.models.model_keys import (
    TRANSFORMERS_REFUSES,
    read_keys,
    refuse_unsupported,
    refused_by_transformers,
    with_floats,
)
from megadistill.models.multimodal.wrappers import WRAPPERS

_HEAD: Final = "lm_head.weight"

_NOT_ON_TEXT: Final = ("mrope_section", "mrope_interleaved", "type")
"""Keys of Qwen VL's rope parameters without an effect on text; `type` is the older name of `rope_type`."""

_OF_THE_WHOLE: Final = ("dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that the whole model's config has where the language model's does not."""


def text_keys(keys: Mapping[str, Any], folder: Path, supported: Collection[str], what: str) -> dict[str, Any] | None:
    """The keys of a config.json of the language model alone, of a supported family; None: there is none that is read.

    Args:
        keys: of the config.json of the multimodal model.
        folder: its weights, if they are there, say whether the head is tied where the config does not.
        supported: the families.
        what: the config's name in messages.

    Raises:
        UserError: transformers refuses the language model's config, or a key of the whole is not supported.
    """
    wrapper = WRAPPERS.get(str(keys.get("model_type")))
    text = None if wrapper is None else keys.get("text_config", keys if wrapper.is_flat else None)
    if wrapper is None or not isinstance(text, Mapping):
        return None
    text_type = str(text.get("model_type", wrapper.text_type)) if wrapper.any_type else wrapper.text_type
    family = wrapper.family or text_type
    if family not in supported:
        return None
    refuse_unsupported(keys, what)
    refuse_unsupported(text, what, ("per_layer_config",))  # which `load_config` reads where the family has it
    plain = dict(text) if family == text_type else _translated(text, text_type, what)
    plain |= {name: keys[name] for name in _OF_THE_WHOLE if plain.get(name) is None and keys.get(name) is not None}
    tied = _is_tied(keys, text, folder)
    if tied is not None:
        plain["tie_word_embeddings"] = tied
    return plain | dict(wrapper.always) | {"model_type": family}


def with_tied_head(content: bytes, folder: Path) -> bytes:
    """A config.json for a copy without weights: it says whether the head is tied where only the folder's weights do."""
    try:
        keys: Any = parse_json(content, constants=True)
    except ValueError:
        return content  # `load_config` says what is wrong with it
    wrapper = WRAPPERS.get(str(keys.get("model_type"))) if isinstance(keys, dict) else None
    text = None if wrapper is None else keys.get("text_config", keys if wrapper.is_flat else None)
    if not isinstance(text, Mapping) or _given_ties(keys, text):
        return content
    tied = _is_tied(keys, text, folder)
    return content if tied is None else json.dumps(keys | {"tie_word_embeddings": tied}, indent=2).encode()


def _translated(text: Mapping[str, Any], text_type: str, what: str) -> dict[str, Any]:
    """The keys as transformers reads them for its own class, whose defaults are not those of the plain family."""
    config_class = CONFIG_MAPPING[text_type]
    known = read_keys(config_class, ())
    read = {key: value for key, value in text.items() if key in known and key != "model_type"}
    refuse_extreme_numbers(read, what)
    try:
        config = config_class.from_dict(with_floats(read, config_class))
        plain: dict[str, Any] = config.to_dict()
    except TRANSFORMERS_REFUSES as error:
        raise refused_by_transformers(error, text_type, what) from None
    rope = plain.get("rope_parameters")
    if isinstance(rope, dict):
        plain["rope_parameters"] = {key: value for key, value in rope.items() if key not in _NOT_ON_TEXT}
    return {key: value for key, value in plain.items() if key in known}


def _is_tied(keys: Mapping[str, Any], text: Mapping[str, Any], folder: Path) -> bool | None:
    """Whether the head is the embedding: by either config, else by the weights; None: neither says."""
    if given := _given_ties(keys, text):
        return any(given)
    if (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file():
        return _HEAD not in SafetensorsFolder(folder)
    return None


def _given_ties(keys: Mapping[str, Any], text: Mapping[str, Any]) -> list[bool]:
    """`tie_word_embeddings` of the whole model and of its language model, where they are given."""
    return [tied for each in (keys, text) if isinstance(tied := each.get("tie_word_embeddings"), bool)]
