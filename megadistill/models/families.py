"""Supported architectures, from a config to a model.

A family is supported when the tests hold it against transformers: cut into stages, counted, exported and loaded back.
Code that comes with a checkpoint is never run: the classes are transformers' own.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from megadistill.config.paths import not_model
from megadistill.errors import UserError
from megadistill.io import read_given_json
from megadistill.models.attention.choice import flash_implementation, has_sdpa
from megadistill.models.attention.flex import register_flex
from megadistill.models.attention.masks import FLEX, attention_inputs, omit_empty_masks
from megadistill.models.config_bounds import refuse_extreme_numbers
from megadistill.models.experts import ExpertNames
from megadistill.models.model_keys import (
    read_keys,
    refuse_partial_rope,
    refuse_unknown,
    refuse_unsupported,
    unsupported_type,
    with_floats,
)
from megadistill.types import LogitTransform

ModelConfig: TypeAlias = PretrainedConfig
Model: TypeAlias = PreTrainedModel


register_flex()


@dataclass(frozen=True)
class Family:
    """Properties of a `model_type` beyond its transformers class."""

    norm_init: float = 1.0
    """Initial weight of a norm, with which it only normalises: Gemma's norms add 1 to theirs."""
    more_keys: tuple[str, ...] = ()
    """Keys of its configs that transformers or this package reads, and the class does not declare."""
    experts: ExpertNames | None = None
    """Names of a mixture's experts."""
    masks_by_kind: bool = False
    """Whether its model takes an attention mask for each kind of layer: those with windows on some layers alone."""


FAMILIES = {
    "exaone4": Family(masks_by_kind=True),
    "gemma2": Family(norm_init=0.0, masks_by_kind=True),
    "gemma3_text": Family(
        norm_init=0.0, more_keys=("rope_local_base_freq", "sliding_window_pattern"), masks_by_kind=True
    ),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(
        more_keys=("router_z_loss_coef",),
        experts=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    "olmo2": Family(),
    "qwen2": Family(masks_by_kind=True),
    "qwen3": Family(masks_by_kind=True),
    "qwen3_moe": Family(
        more_keys=("router_z_loss_coef",),
        experts=ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
}
"""The `model_type`s that are supported: causal decoders whose layers hand on nothing but hidden states."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that a config may name."""

EXPERT_MULTIPLE = 8
"""Numbers of a bfloat16 row in 16 bytes, which `torch.nn.functional.grouped_mm` asks for."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def load_config(source: Mapping[str, Any] | Path, *, what: str) -> PretrainedConfig:
    """The config of a supported family: from an inline mapping with `model_type`, or from a folder's config.json.

    `what` names the source in messages (`student.model`). Keys that the family does not have are refused in a mapping,
    where they are typing mistakes that transformers would keep in silence; published folders are full of them, and
    there they are dropped.

    Raises:
        UserError: another family, an unknown key, sizes that do not fit together, quantised weights.
    """
    if isinstance(source, Path):
        if not (source / "config.json").is_file():
            raise UserError(not_model(source, what))
        way_out = "name a Hugging Face model folder"
        keys: dict[str, Any] = read_given_json(source / "config.json", dict, what=what, way_out=way_out)
    else:
        keys = copy.deepcopy(dict(source))
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported_type(keys, FAMILIES, what)
    refuse_unsupported(keys, what)
    config_class = CONFIG_MAPPING[model_type]
    known = read_keys(config_class, FAMILIES[model_type].more_keys)
    if not isinstance(source, Path):
        refuse_unknown(keys, known, what)
    keys = {key: value for key, value in keys.items() if key in known}
    refuse_extreme_numbers(keys, what)
    try:
        config = config_class.from_dict(with_floats(keys, config_class))
        if family(config).experts is not None:
            config.output_router_logits = False  # every forward pass would keep them, and nothing here reads them
        _refuse_inconsistent_sizes(config, what)
        if isinstance(config.pad_token_id, int) and not 0 <= config.pad_token_id < config.vocab_size:
            config.pad_token_id = None  # of a tokenizer with more ids than the model has rows
        refuse_partial_rope(config, what)
        if not _names_head_dim(keys) and config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{what}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}, and there is no head_dim"
            )
        # Activation and rope names are looked up when a layer is built, and nowhere before.
        build_decoder(config, layers=range(1))
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{what}: transformers refuses this {model_type} config: {reason}") from None
    return config


def _refuse_inconsistent_sizes(config: PretrainedConfig, what: str) -> None:
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise UserError(f"{what}: {name} is {getattr(config, name)}, it must be at least 1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{what}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if (given := getattr(config, "head_dim", None)) is not None and given < 1:
        raise UserError(f"{what}: head_dim is {given}, it must be at least 2")
    if head_dim(config) % 2:
        raise UserError(f"{what}: a head is {head_dim(config)} wide, and rotary embeddings turn pairs: make it even")
    kinds = getattr(config, "layer_types", None) or []
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{what}: layer_types has {sorted(unknown)}; it may have full and sliding attention")
    if config.dtype is not None and config.dtype not in PRECISIONS:
        raise UserError(f"{what}: dtype is {config.dtype}; weights may be float16, bfloat16, float32 or float64")
    if family(config).experts is not None:
        _refuse_inconsistent_experts(config, what)


def _names_head_dim(keys: Mapping[str, Any]) -> bool:
    """Whether a config says how wide a head is, itself or by its family's default; else the width is divided."""
    defaults = {field.name: field.default for field in fields(CONFIG_MAPPING[keys["model_type"]])}
    return keys.get("head_dim") is not None or isinstance(defaults.get("head_dim"), int)


def _refuse_inconsistent_experts(config: PretrainedConfig, what: str) -> None:
    experts, chosen = config.num_experts, config.num_experts_per_tok
    if not 1 <= chosen <= experts:
        raise UserError(f"{what}: num_experts_per_tok is {chosen}, of {experts} experts; a token takes 1 to {experts}")
    for name in ("moe_intermediate_size", "decoder_sparse_step"):
        if getattr(config, name, 1) < 1:
            raise UserError(f"{what}: {name} is {getattr(config, name)}, it must be at least 1")
    inner = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    for name in ("hidden_size", inner):
        if getattr(config, name) % EXPERT_MULTIPLE:
            raise UserError(
                f"{what}: {name} is {getattr(config, name)}; with experts it must be a multiple of {EXPERT_MULTIPLE}, "
                "since torch multiplies all experts at once only where rows are multiples of 16 bytes"
            )


def family(config: PretrainedConfig) -> Family:
    """The family of a config that `load_config` has let through."""
    return FAMILIES[config.model_type]


def head_dim(config: PretrainedConfig) -> int:
    """The width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def forward_inputs(decoder: Any, x: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of the decoder's forward pass: `x` is tokens [B, S], or hidden states [B, S, E].

    `positions` [B, S] int64 restart at 0 where a document begins, and no token attends to one of another document.
    None: a row is one document. The pass has no host-device sync, but with rotary embeddings whose stretch depends on
    the length of a sequence ("dynamic", "longrope"): transformers then reads the largest position, one sync.
    """
    name = "input_ids" if x.dim() == 2 else "inputs_embeds"
    attention = attention_inputs(
        decoder.config,
        positions,
        (x.shape[0], x.shape[1]),
        by_kind=family(decoder.config).masks_by_kind,
        dtype=next(decoder.parameters()).dtype,
        device=x.device,
    )
    return {name: x, "position_ids": positions, **attention, "use_cache": False}


def logit_transform(config: Any) -> LogitTransform:
    """The transform of the head's products into logits, by the config keys of transformers' families.

    Gemma bounds them (`final_logit_softcapping`), Cohere multiplies them (`logit_scale`), Granite divides them
    (`logits_scaling`). A key has no effect where it is absent or None, nor where the family does not
    declare it: transformers keeps and ignores it.

    Raises:
        ValueError, ZeroDivisionError: a softcap that is not positive, or a scale that is 0.
    """
    declared = {field.name for field in fields(config)}
    softcap, multiplied, divided = (
        getattr(config, name) if name in declared else None
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    scale = 1.0 if multiplied is None else float(multiplied)
    return LogitTransform(softcap=softcap, scale=scale if divided is None else scale / divided)


def transformers_attention(config: PretrainedConfig, attention: str | None) -> str:
    """transformers' name of `eager`, `sdpa`, `flex` or `flash`. None: torch's, or eager for a family without."""
    attention = attention or ("sdpa" if has_sdpa(config) else "eager")
    return {"flex": FLEX, "flash": flash_implementation() or "flash_attention_2"}.get(attention, attention)


def build_causal_lm(
    config: PretrainedConfig,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    attention: str | None = None,
    initialise: bool = True,
) -> PreTrainedModel:
    """The model with its head, over `vocab_size` rows (padding included), in the caller's context and device.

    `attention`: what `choose_attention` chose; None: torch's own, or eager for a family without.

    Every token's embedding is trained: torch would leave out the row of a `pad_token_id`, which Gemma and OLMo 2 set to
    0 and 1 where a config is silent, and which is an id like any other of another tokenizer.

    `initialise`: whether torch and transformers draw initial values. Inside `zero.Init` the parameters come out
    partitioned, wrongly initialised, and the buffers in `dtype`: fill the parameters and call `rebuild_buffers`
    outside.
    """
    config = copy.deepcopy(config)
    config.vocab_size = vocab_size
    config.pad_token_id = None
    config.use_cache = False
    with nullcontext() if initialise else no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=transformers_attention(config, attention), trust_remote_code=False
        )
    if not initialise:
        model.tie_weights()  # transformers does it where it draws values
    omit_empty_masks(decoder(model))
    return model


def build_on_meta(config: PretrainedConfig, *, attention: str | None = None) -> PreTrainedModel:
    """The whole model with its head on meta, built from its class, as `build_decoder` says."""
    config = copy.deepcopy(config)
    config._attn_implementation = transformers_attention(config, attention)
    config.pad_token_id = None
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    omit_empty_masks(decoder(model))
    return model


def build_decoder(config: PretrainedConfig, *, layers: range, attention: str | None = None) -> PreTrainedModel:
    """The model without its head, with these layers alone, on meta. `attention`: see `build_causal_lm`.

    Built from its class: `from_config` would partition it where an HfDeepSpeedConfig is alive (trap 6 of
    tests/ranks/student/test_deepspeed_traps.py).
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    config.pad_token_id = None  # without a row it is a traceback; with one it changes only its row's gradient
    config._attn_implementation = transformers_attention(config, attention)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers.start : layers.stop]
    if hasattr(config, "mlp_only_layers"):  # counted from the first layer of the whole model
        config.mlp_only_layers = [place for place, layer in enumerate(layers) if not _has_experts(config, layer)]
        config.decoder_sparse_step = 1
    config.num_hidden_layers = len(layers)
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_MAPPING[type(config)](config)
    omit_empty_masks(model)
    return model


def expert_layers(config: PretrainedConfig) -> list[int]:
    """Numbers of the layers with experts; none for a dense model."""
    layers = range(config.num_hidden_layers if family(config).experts is not None else 0)
    return [layer for layer in layers if not hasattr(config, "mlp_only_layers") or _has_experts(config, layer)]


def _has_experts(config: PretrainedConfig, layer: int) -> bool:
    """transformers' rule for Qwen's mixtures, which have dense layers as well."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: embedding, layers, last norm. A decoder is its own decoder."""
    return model.base_model


def rebuild_buffers(model: PreTrainedModel) -> None:
    """Computes again what is in no checkpoint, on the device of the parameters. Call it outside `zero.Init`.

    The rotary embedding in float32, local and global where a family has both: a model built on meta has none, and
    `zero.Init` casts it to bfloat16, which turns position 8192 by up to 22 rad (trap 1 there). Computed on the CPU, as
    `from_pretrained` does. And the factor of Gemma's embeddings, which the embedding itself applies (so it scales on
    the first stage alone) after rounding it to the weights' type.
    """
    inner = decoder(model)
    device = next(inner.parameters()).device
    with torch.device("cpu"):
        rotary = type(inner.rotary_emb)(config=inner.config)
    assert all(buffer.dtype == torch.float32 for buffer in rotary.buffers())
    inner.rotary_emb = rotary.to(device)
    embedding = inner.embed_tokens
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, dtype=torch.float32, device=device)


def parameter_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Name -> shape of each parameter of transformers' model, the head's included; a tied head has none of its own."""
    return {name: parameter.shape for name, parameter in build_on_meta(config).named_parameters()}
