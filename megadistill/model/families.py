"""Room `model`: the architectures that are supported, from a config to a model. It knows no ranks and no engine.

A family is supported when the tests hold it against transformers: cut into stages, counted, exported and loaded back.
Code that comes with a checkpoint is never run: the classes are transformers' own.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from megadistill.errors import UserError, nearest
from megadistill.model.checkpoint import SafetensorsFolder
from megadistill.records import LogitTransform

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type`s that are supported: pre-norm decoders whose layers hand on nothing but hidden states."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_LEGACY_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")
"""Keys of published configs that transformers still reads, and translates."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def load_config(source: Mapping[str, Any] | Path, *, what: str) -> PretrainedConfig:
    """The config of a supported family: from an inline mapping with `model_type`, or from a folder's config.json.

    `what` names the source in messages (`student.model`). Keys that the family does not have are refused in a mapping,
    where they are typing mistakes that transformers would keep in silence; published folders are full of them.

    Raises:
        UserError: another family, an unknown key, sizes that do not fit together, quantised weights.
    """
    keys = _read_json(source, what) if isinstance(source, Path) else copy.deepcopy(dict(source))
    model_type = keys.get("model_type")
    if model_type not in FAMILIES:
        hint = nearest(str(model_type), FAMILIES)
        raise UserError(f"{what}: model_type is {model_type!r}; supported are {', '.join(FAMILIES)}{hint}")
    if keys.get("quantization_config") is not None:
        raise UserError(f"{what}: quantised weights are not supported; name a folder with bfloat16 or float32 weights")
    if keys.get("per_layer_config"):
        raise UserError(f"{what}: per_layer_config is not supported; all layers must have the same sizes")
    if not isinstance(source, Path):
        _refuse_unknown_keys(keys, what)
    keys.pop("auto_map", None)  # names code that comes with the checkpoint
    try:
        config = CONFIG_MAPPING[model_type].from_dict(keys)
        _refuse_inconsistent_sizes(config, what)
        # Activation and rope names are looked up when a layer is built, and nowhere before.
        build_decoder(config, layers=range(1))
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{what}: transformers refuses this {model_type} config: {reason}") from None
    return config


def _read_json(folder: Path, what: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist; name a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} cannot be read as JSON: {error}") from None
    if not isinstance(keys, dict):
        raise UserError(f"{what}: {path} holds a {type(keys).__name__}, not an object with a model_type")
    return keys


def _refuse_unknown_keys(keys: Mapping[str, Any], what: str) -> None:
    config_class = CONFIG_MAPPING[keys["model_type"]]
    known = {"model_type", *_LEGACY_KEYS, *(field.name for field in fields(config_class))}
    for key in keys:
        if key not in known:
            raise UserError(f"{what}: a {keys['model_type']} model has no {key!r}{nearest(str(key), sorted(known))}")


def _refuse_inconsistent_sizes(config: PretrainedConfig, what: str) -> None:
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise UserError(f"{what}: {name} is {getattr(config, name)}, it must be at least 1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads:
        raise UserError(f"{what}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{what}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim(config) % 2:
        raise UserError(f"{what}: a head is {head_dim(config)} wide, and rotary embeddings turn pairs: make it even")
    kinds = getattr(config, "layer_types", None) or []
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{what}: layer_types has {sorted(unknown)}; it may have full and sliding attention")


def head_dim(config: PretrainedConfig) -> int:
    """The width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def reading(x: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """What a decoder is called with: x is tokens [B, S], or hidden states [B, S, E] of the layers before.

    `positions` [B, S] int64 restart at 0 where a document begins. transformers' masks follow from them: where they do
    not go up by one, another document begins, and no token attends to one before it. None: a row is one document.
    """
    name = "input_ids" if x.dim() == 2 else "inputs_embeds"
    return {name: x, "position_ids": positions, "use_cache": False}


def logit_transform(config: Any) -> LogitTransform:
    """What the model does to its head's products, by the names that transformers' families give it.

    Gemma 2 bounds them (`final_logit_softcapping`), Cohere multiplies them (`logit_scale`), Granite divides them
    (`logits_scaling`). A key that is absent or None does nothing.

    Raises:
        ValueError, ZeroDivisionError: a softcap that is not positive, or a scale that is 0.
    """
    multiplied, divided = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = 1.0 if multiplied is None else float(multiplied)
    return LogitTransform(
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale if divided is None else scale / divided,
    )


def build_causal_lm(config: PretrainedConfig, *, vocab_size: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its head, over `vocab_size` rows (padding included), in the caller's context and device.

    Inside `zero.Init` its parameters come out partitioned, wrongly initialised, and its rotary buffers in `dtype`: fill
    the parameters with `initial_tensor` and call `rebuild_rotary` outside.
    """
    config = copy.deepcopy(config)
    config.vocab_size = vocab_size
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def build_decoder(config: PretrainedConfig, *, layers: range) -> PreTrainedModel:
    """The model without its head, with these layers alone, on meta.

    Built from its class: `from_config` would partition it where an HfDeepSpeedConfig is alive (trap 6 of
    tests/ranks/test_deepspeed_traps.py).
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    config._attn_implementation = "sdpa"
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers.start : layers.stop]
    config.num_hidden_layers = len(layers)
    with torch.device("meta"):
        return MODEL_MAPPING[type(config)](config)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: embedding, layers, last norm. A decoder is its own decoder."""
    return model.base_model


def rebuild_rotary(model: PreTrainedModel) -> None:
    """Replaces the rotary embedding by one in float32, on the device of the parameters. Call it outside `zero.Init`.

    Its buffers are in no checkpoint, so a model built on meta has none; and `zero.Init` casts them to bfloat16, which
    turns position 8192 by up to 22 rad (trap 1 there). Computed on the CPU, as `from_pretrained` does.
    """
    inner = decoder(model)
    device = next(inner.parameters()).device
    with torch.device("cpu"):
        rotary = type(inner.rotary_emb)(config=inner.config)
    assert all(buffer.dtype == torch.float32 for buffer in rotary.buffers())
    inner.rotary_emb = rotary.to(device)


def parameter_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Checkpoint name -> shape of each parameter, the head's included; a tied head has none of its own."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def load_pretrained(folder: Path, *, what: str, device: torch.device) -> PreTrainedModel:
    """A whole model from its folder, in the precision that it is stored in, for evaluation. Only safetensors are read.

    Raises:
        UserError: the folder holds no model of a supported family, or its weights cannot be read.
    """
    config = load_config(folder, what=what)
    weights = SafetensorsFolder(folder)
    for name, shape in parameter_shapes(config).items():  # transformers would fill a missing one with random numbers
        if weights.shape(name) != shape:
            raise UserError(f"{what}: {name} is {list(weights.shape(name))}, but config.json says {list(shape)}")
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="sdpa", use_safetensors=True, local_files_only=True
    )
    return model.to(device).eval()
