"""Supported architectures, from a config to a model.

A family is supported when the tests hold it against transformers: cut into stages, counted, exported and loaded back.
Code that comes with a checkpoint is never run: the classes are transformers' own.
"""

import copy
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
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
from megadistill.models.attention.masks import FLEX, INDEXED_KINDS, attention_inputs, omit_empty_masks
from megadistill.models.attention.sequence import register_shared_attention
from megadistill.models.config_bounds import refuse_extreme_numbers
from megadistill.models.configs.text_config import text_keys
from megadistill.models.configs.unequal_layers import keep_unequal_layers, layer_configs, refuse_unequal_sizes
from megadistill.models.experts import ExpertNames, experts_per_token, number_of_experts
from megadistill.models.forward.llama4_experts import use_own_tokens
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs, per_layer_inputs
from megadistill.models.model_keys import (
    TRANSFORMERS_REFUSES,
    read_keys,
    refuse_rope,
    refuse_unknown,
    refuse_unsupported,
    refused_by_transformers,
    unsupported_type,
    with_floats,
    without_idle_window,
)
from megadistill.models.module_names import rename_modules
from megadistill.types import LogitTransform, SequencePart

ModelConfig: TypeAlias = PretrainedConfig
Model: TypeAlias = PreTrainedModel


register_flex()
register_shared_attention()


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
    layer_kinds: tuple[str, ...] = ("full_attention", "sliding_attention")
    """Kinds that a config's `layer_types` may name."""
    by_layer: tuple[str, ...] = ()
    """Keys of its configs, beside `layer_types`, with a value for each layer of the whole model."""
    partial_rope: bool = False
    """Whether rotary embeddings may turn a part of each head (`partial_rotary_factor`)."""
    teacher_only: str = ""
    """Why it can only teach: a clause that follows "can only teach: ". Empty: it can be a student as well."""
    recurrent: bool = False
    """Whether layers carry a state along a row, which crosses the bounds of documents: no mask keeps them apart."""
    divides_width: bool = False
    """Whether its class computes with a `head_dim` that its configs may leave out: the width over the heads."""
    rope_keys: tuple[str, ...] = ()
    """Keys that its `rope_parameters` must have beside transformers' own: a forward pass would fail without them."""
    unread_keys: tuple[str, ...] = ()
    """Keys that most families read, and that its class keeps and ignores."""
    unpruned: str = ""
    """Why `prune` has no rule for it: a clause that follows "is not pruned: ". Empty: it is pruned."""
    teacher_only_with: tuple[tuple[str, str], ...] = ()
    """(Key of a config, why a model can only teach where it is set): for families that can be students without."""
    constants: tuple[tuple[str, float], ...] = ()
    """(End of a name, value) of buffers that checkpoints hold and no gradient moves, in a student's model."""


_LAYER_NORMS = "its norms subtract a mean over all channels, and there is no rule for the mean of fewer"

_EXPERTS = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")

_OLD_MAMBA_KEYS = (
    "mamba_n_groups", "mamba_d_conv", "mamba_expand", "mamba_dt_min", "mamba_dt_max",
    "mamba_dt_init_floor", "mamba_conv_bias", "mamba_chunk_size",
)  # fmt: skip
"""Older names of Nemotron-H's keys, which transformers translates."""

_NOT_TRAINED = "no test holds its recurrent layers against a dense model in training"

_BALANCED_BY_BIASES = "its experts are balanced by biases that no gradient moves, and nothing here moves them"

_SCALED_LAYERS = "its layers are scaled by numbers that no gradient moves, and there is no rule for them"

_INDEXED = "no test holds its indexers against a dense model in training"

_TABLE = {
    "apertus": Family(
        constants=(("beta", 0.5), ("eps", -1e-6)),
        unpruned="its activation has numbers of its own, and no test prunes it",
    ),
    "arcee": Family(),
    "cohere": Family(unpruned=_LAYER_NORMS),
    "cohere2": Family(more_keys=("sliding_window_pattern",), masks_by_kind=True, unpruned=_LAYER_NORMS),
    "cwm": Family(masks_by_kind=True),
    "deepseek_v3": Family(experts=_EXPERTS, teacher_only=_BALANCED_BY_BIASES),
    "deepseek_v32": Family(
        more_keys=("num_experts",),
        experts=_EXPERTS,
        masks_by_kind=True,
        layer_kinds=INDEXED_KINDS,
        by_layer=("mlp_layer_types",),
        teacher_only=_INDEXED,
    ),
    "ernie4_5": Family(),
    "ernie4_5_moe": Family(
        experts=ExpertNames(
            block="mlp",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            renamed=(("gate.moe_statics.e_score_correction_bias", "moe_statics.e_score_correction_bias"),),
        ),
        teacher_only=_BALANCED_BY_BIASES,
    ),
    "exaone4": Family(masks_by_kind=True),
    "falcon_h1": Family(
        unread_keys=("time_step_limit",),
        masks_by_kind=True,
        layer_kinds=("hybrid",),
        recurrent=True,
        teacher_only=_NOT_TRAINED,
        unpruned=_NOT_TRAINED,
    ),
    "gemma": Family(norm_init=0.0),
    "gemma2": Family(norm_init=0.0, masks_by_kind=True),
    "gemma3_text": Family(
        norm_init=0.0, more_keys=("rope_local_base_freq", "sliding_window_pattern"), masks_by_kind=True
    ),
    "gemma3n_text": Family(
        more_keys=("rope_local_base_freq",),
        masks_by_kind=True,
        by_layer=("intermediate_size", "activation_sparsity_pattern"),
        teacher_only="no test holds its streams of hidden states against a dense model in training",
        unpruned="its layers share what they compute",
    ),
    "gemma4_text": Family(
        more_keys=("global_head_dim", "num_global_key_value_heads", "per_layer_config"),
        experts=ExpertNames(block="", module=""),
        masks_by_kind=True,
        partial_rope=True,
        teacher_only_with=(
            ("enable_moe_block", "its routers give probabilities alone, and losses that balance experts need logits"),
            ("hidden_size_per_layer_input", "no test holds its inputs by layer against a dense model in training"),
            ("num_kv_shared_layers", "no test holds shared keys and values against a dense model in training"),
        ),
        constants=(("layer_scalar", 1.0),),
        unpruned=_SCALED_LAYERS,
    ),
    "glm": Family(partial_rope=True),
    "glm4": Family(partial_rope=True),
    "glm4_moe": Family(partial_rope=True, experts=_EXPERTS, teacher_only=_BALANCED_BY_BIASES),
    "glm_moe_dsa": Family(
        more_keys=("num_experts", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
        experts=_EXPERTS,
        masks_by_kind=True,
        layer_kinds=INDEXED_KINDS,
        by_layer=("mlp_layer_types", "indexer_types"),
        teacher_only=_INDEXED,
    ),
    "gpt_neox": Family(
        more_keys=("rotary_emb_base", "rotary_pct"),
        partial_rope=True,
        unread_keys=("head_dim", "partial_rotary_factor", "rope_theta"),
        unpruned=_LAYER_NORMS,
    ),
    "gpt_oss": Family(more_keys=("router_z_loss_coef",), experts=ExpertNames(block="mlp"), masks_by_kind=True),
    "granite": Family(),
    "granitemoe": Family(
        more_keys=("router_z_loss_coef",),
        experts=ExpertNames(
            block="block_sparse_moe",
            module="block_sparse_moe",
            renamed=(
                ("experts.gate_up_proj", "input_linear.weight"),
                ("experts.down_proj", "output_linear.weight"),
                ("router.weight", "router.layer.weight"),
            ),
        ),
    ),
    "hunyuan_v1_dense": Family(divides_width=True),
    "llama": Family(),
    "llama4_text": Family(
        experts=ExpertNames(block="feed_forward", module="feed_forward"),
        masks_by_kind=True,
        layer_kinds=("full_attention", "chunked_attention"),
        by_layer=("no_rope_layers",),
        teacher_only="no test holds its experts against a dense model in training",
    ),
    "ministral": Family(masks_by_kind=True, divides_width=True),
    "ministral3": Family(rope_keys=("llama_4_scaling_beta", "original_max_position_embeddings")),
    "mistral": Family(),
    "mixtral": Family(
        more_keys=("router_z_loss_coef",),
        experts=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    "nemotron_h": Family(
        more_keys=("hybrid_override_pattern", "num_hidden_layers", *_OLD_MAMBA_KEYS),
        unread_keys=("time_step_limit",),
        experts=ExpertNames(block="mixer", module="mixer", up="up_proj", down="down_proj"),
        masks_by_kind=True,
        layer_kinds=("full_attention", "linear_attention", "mlp", "moe"),
        recurrent=True,
        teacher_only=_NOT_TRAINED,
    ),
    "olmo2": Family(),
    "olmo3": Family(masks_by_kind=True),
    "olmoe": Family(more_keys=("router_z_loss_coef",), experts=_EXPERTS),
    "phi3": Family(partial_rope=True),
    "qwen2": Family(masks_by_kind=True),
    "qwen2_moe": Family(more_keys=("router_z_loss_coef",), experts=_EXPERTS, masks_by_kind=True),
    "qwen3": Family(masks_by_kind=True),
    "qwen3_moe": Family(more_keys=("router_z_loss_coef",), experts=_EXPERTS),
    "qwen3_5_moe_text": Family(
        more_keys=("full_attention_interval",),
        experts=_EXPERTS,
        masks_by_kind=True,
        layer_kinds=("full_attention", "linear_attention"),
        partial_rope=True,
        recurrent=True,
        teacher_only=_NOT_TRAINED,
    ),
    "qwen3_5_text": Family(
        more_keys=("full_attention_interval",),
        masks_by_kind=True,
        layer_kinds=("full_attention", "linear_attention"),
        partial_rope=True,
        recurrent=True,
        teacher_only=_NOT_TRAINED,
        unpruned=_NOT_TRAINED,
    ),
    "qwen3_next": Family(
        more_keys=("full_attention_interval",),
        experts=_EXPERTS,
        masks_by_kind=True,
        layer_kinds=("full_attention", "linear_attention"),
        partial_rope=True,
        recurrent=True,
        teacher_only=_NOT_TRAINED,
    ),
    "seed_oss": Family(),
    "smollm3": Family(masks_by_kind=True, by_layer=("no_rope_layers",)),
    "starcoder2": Family(unpruned=_LAYER_NORMS),
}

FAMILIES = {model_type: each for model_type, each in _TABLE.items() if model_type in CONFIG_MAPPING}
"""The `model_type`s that are supported: causal decoders whose layers hand on nothing but hidden states.

Without those that the installed transformers does not have.
"""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that a config may name."""

EXPERT_MULTIPLE = 8
"""Numbers of a bfloat16 row in 16 bytes, which `torch.nn.functional.grouped_mm` asks for."""

DROPOUTS = (
    "attention_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "residual_dropout",
)
"""Keys of configs that drop activations at random in training; a teacher drops none."""

_HEAD_WIDTHS = ("head_dim", "qk_rope_head_dim")
"""Keys of a head's width; of latent attention, of the part that is turned."""

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
        place = source / "config.json"
        keys: dict[str, Any] = read_given_json(place, dict, what=what, way_out=way_out, constants=True)
        keys = text_keys(keys, source, FAMILIES, what) or keys
    else:
        keys = copy.deepcopy(dict(source))
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported_type(keys, FAMILIES, what)
    refuse_unsupported(keys, what, FAMILIES[model_type].more_keys)
    if model_type == "falcon_h1":
        _refuse_time_step_limit(keys.get("time_step_limit"), what)
    config_class = CONFIG_MAPPING[model_type]
    known = read_keys(config_class, FAMILIES[model_type].more_keys) - set(FAMILIES[model_type].unread_keys)
    if not isinstance(source, Path):
        refuse_unknown(keys, known, what)
    keys = without_idle_window({key: value for key, value in keys.items() if key in known}, config_class)
    refuse_extreme_numbers(keys, what)
    try:
        config = config_class.from_dict(with_floats(keys, config_class))
        if family(config).experts is not None:
            config.output_router_logits = False  # every forward pass would keep them, and nothing here reads them
        if not hasattr(layer_configs(config)[0], "num_key_value_heads"):
            config.num_key_value_heads = config.num_attention_heads
        refuse_unequal_sizes(config, what)
        if family(config).divides_width and config.head_dim is None and config.num_attention_heads > 0:
            config.head_dim = config.hidden_size // config.num_attention_heads
        _refuse_inconsistent_sizes(config, what)
        if isinstance(config.pad_token_id, int) and not 0 <= config.pad_token_id < config.vocab_size:
            config.pad_token_id = None  # of a tokenizer with more ids than the model has rows
        refuse_rope(
            config, what, head=head_dim(config), partial=family(config).partial_rope, keys=family(config).rope_keys
        )
        if not _names_head_dim(keys) and config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{what}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}, and there is no head_dim"
            )
        _try_to_build(config)
    except UserError:
        raise
    except TRANSFORMERS_REFUSES as error:
        raise refused_by_transformers(error, model_type, what) from None
    return config


def _refuse_time_step_limit(limit: Any, what: str) -> None:
    """Refuses a limit of Mamba's time steps: there is none by default, which JSON has no number for."""
    unlimited = limit is None or (isinstance(limit, list | tuple) and list(limit[:1]) == [0] and "nf" in str(limit[1:]))
    if not unlimited:
        raise UserError(f"{what}: time_step_limit is {str(limit)[:100]}; supported is none, from 0 to infinity")


def _try_to_build(config: PretrainedConfig) -> None:
    """Builds a dense layer, one of experts, and rotary embeddings: names are looked up there, and nowhere before."""
    for layer in sorted({0, *expert_layers(config)[:1]}):
        part = build_decoder(config, layers=range(layer, layer + 1))
        if hasattr(part, "rotary_emb"):
            with torch.device("meta"):
                type(part.rotary_emb)(config=copy.deepcopy(config))  # of all kinds of layers, where each has its own


def _refuse_inconsistent_sizes(config: PretrainedConfig, what: str) -> None:
    for name in _SIZES:
        value = getattr(config, name, 1)  # Qwen 3.5's mixture has no dense layers
        if min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"{what}: {name} is {value}, it must be at least 1")
    for each in layer_configs(config):
        heads, kv_heads = each.num_attention_heads, each.num_key_value_heads
        if kv_heads < 1 or heads % kv_heads:
            raise UserError(f"{what}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if (given := getattr(each, "head_dim", None)) is not None and given < 1:
            raise UserError(f"{what}: head_dim is {given}, it must be at least 2")
        if _head_dim(each) % 2:
            raise UserError(f"{what}: a head is {_head_dim(each)} wide, and rotary embeddings turn pairs: make it even")
    kinds, known = getattr(config, "layer_types", None) or [], family(config).layer_kinds
    if unknown := set(kinds) - set(known):
        raise UserError(f"{what}: layer_types has {sorted(unknown)}; it may have {' and '.join(known)}")
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and not window:
        raise UserError(
            f"{what}: layer_types has sliding_attention, and sliding_window is {window}: give the window's tokens"
        )
    _refuse_short_lists(config, what)
    _refuse_unequal_heads(config, what)
    if "chunked_attention" in kinds and not config.attention_chunk_size:
        raise UserError(f"{what}: layer_types has chunked_attention, and attention_chunk_size is not set")
    if (indexers := getattr(config, "indexer_types", None)) and indexers[0] != "full":
        raise UserError(f"{what}: indexer_types begins with {indexers[0]!r}; the first layer has an indexer of its own")
    if config.tie_word_embeddings and not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._tied_weights_keys:
        raise UserError(f"{what}: tie_word_embeddings is true; a {config.model_type} model has a head of its own")
    if config.dtype is not None and config.dtype not in PRECISIONS:
        raise UserError(f"{what}: dtype is {config.dtype}; weights may be float16, bfloat16, float32 or float64")
    if has_experts(config):
        _refuse_inconsistent_experts(config, what)


def _refuse_unequal_heads(config: PretrainedConfig, what: str) -> None:
    """Latent attention has keys for each head; elsewhere each head of keys, or group, serves as many of values."""
    if hasattr(config, "kv_lora_rank") and config.num_attention_heads != config.num_key_value_heads:
        raise UserError(
            f"{what}: num_key_value_heads is {config.num_key_value_heads}, and num_attention_heads "
            f"{config.num_attention_heads}; in latent attention they are equal"
        )
    if hasattr(config, "mamba_n_heads") and config.mamba_n_heads % config.mamba_n_groups:
        raise UserError(
            f"{what}: mamba_n_heads {config.mamba_n_heads} is not a multiple of mamba_n_groups {config.mamba_n_groups}"
        )
    if getattr(config, "mamba_num_heads", 0) % getattr(config, "n_groups", 1):
        raise UserError(
            f"{what}: mamba_num_heads {config.mamba_num_heads} is not a multiple of n_groups {config.n_groups}"
        )
    keys, values = (getattr(config, f"linear_num_{each}_heads", 1) for each in ("key", "value"))
    if values % keys:
        raise UserError(f"{what}: linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")


def _refuse_short_lists(config: PretrainedConfig, what: str) -> None:
    for name in family(config).by_layer:
        values = getattr(config, name, None)
        if values is not None and (not isinstance(values, list) or len(values) < config.num_hidden_layers):
            held = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise UserError(
                f"{what}: {name} has {held}, and the model {config.num_hidden_layers} layers: give one each"
            )


def _names_head_dim(keys: Mapping[str, Any]) -> bool:
    """Whether a config says how wide a head is, itself or by its family's default; else the width is divided."""
    defaults = {field.name: field.default for field in fields(CONFIG_MAPPING[keys["model_type"]])}
    return keys.get("head_dim") is not None or any(isinstance(defaults.get(name), int) for name in _HEAD_WIDTHS)


def _refuse_inconsistent_experts(config: PretrainedConfig, what: str) -> None:
    experts, chosen = number_of_experts(config), experts_per_token(config)
    if not 1 <= chosen <= experts:
        key = "top_k_experts" if hasattr(config, "top_k_experts") else "num_experts_per_tok"
        raise UserError(f"{what}: {key} is {chosen}, of {experts} experts; a token takes 1 to {experts}")
    _refuse_unequal_groups(config, experts, what)
    if getattr(config, "moe_layer_interval", 1) != 1:
        raise UserError(f"{what}: moe_layer_interval is {config.moe_layer_interval}; supported is 1")
    for name in ("moe_intermediate_size", "decoder_sparse_step", "n_shared_experts", "shared_expert_intermediate_size"):
        if getattr(config, name, 1) < 1:
            raise UserError(f"{what}: {name} is {getattr(config, name)}, it must be at least 1")
    inner = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    for name in ("hidden_size", inner):
        if getattr(config, name) % EXPERT_MULTIPLE:
            raise UserError(
                f"{what}: {name} is {getattr(config, name)}; with experts it must be a multiple of {EXPERT_MULTIPLE}, "
                "since torch multiplies all experts at once only where rows are multiples of 16 bytes"
            )


def _refuse_unequal_groups(config: PretrainedConfig, experts: int, what: str) -> None:
    """The router takes experts of the `topk_group` best of `n_group` groups, by the sum of a group's two best."""
    groups = getattr(config, "n_group", None) or 1
    chosen = getattr(config, "topk_group", None) or 1
    grouped = hasattr(config, "n_group")
    if grouped and (experts % groups or experts // groups < 2 or not 1 <= chosen <= groups):
        raise UserError(
            f"{what}: n_group is {groups} and topk_group {chosen}, of {experts} experts; groups are equal, of two "
            "experts or more, and topk_group is 1 to n_group"
        )
    if grouped and config.num_experts_per_tok > experts // groups * chosen:
        raise UserError(
            f"{what}: num_experts_per_tok is {config.num_experts_per_tok}, and {chosen} groups have "
            f"{experts // groups * chosen} experts"
        )


def family(config: PretrainedConfig) -> Family:
    """The family of a config that `load_config` has let through."""
    return FAMILIES[config.model_type]


def refuse_as_student(config: PretrainedConfig, what: str) -> None:
    """Refuses a family that can only teach. Call it where a student's config is loaded, before anything costs.

    Raises:
        UserError: with the reason, and the families that can be students.
    """
    if reason := family(config).teacher_only:
        students = ", ".join(name for name, each in FAMILIES.items() if not each.teacher_only)
        raise UserError(f"{what}: a {config.model_type} model can only teach: {reason}; students may be {students}")
    for key, reason in family(config).teacher_only_with:
        if value := getattr(config, key, None):
            off = f"{key} is {'false' if value is True else 0}"
            raise UserError(
                f"{what}: a {config.model_type} model with {key} {value} can only teach: {reason}; a student's {off}"
            )


def refuse_documents(
    config: PretrainedConfig,
    what: str,
    by: str = "data.document_mask",
    way_out: str = "leave it out, or take another model",
    *,
    sequence_length: int | None = None,
) -> None:
    """Refuses a model in which documents of a row that `by` keeps apart would see each other, or each other's length.

    `sequence_length`: of the longest rows; None: unknown.

    Raises:
        UserError: `what` is the config.
    """
    if sequence_length is not None:
        _refuse_long_documents(config, what, by, sequence_length)
    if family(config).recurrent:
        raise UserError(
            f"{what}: recurrent layers of a {config.model_type} model carry their state over the bounds of documents, "
            f"which {by} keeps apart: {way_out}"
        )


def _refuse_long_documents(config: PretrainedConfig, what: str, by: str, sequence_length: int) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        kind = each.get("rope_type")
        own = getattr(config, "original_max_position_embeddings", None)
        known = each.get("original_max_position_embeddings") or own or config.max_position_embeddings
        if kind in ("dynamic", "longrope") and sequence_length > known and not each.get("alpha"):
            raise UserError(
                f"{what}: rotary embeddings of type {kind} stretch with the longest of the documents that share a "
                f"micro-batch, where {by} keeps them apart and sequences of {sequence_length:,} tokens are longer than "
                f"{known:,}: leave it out, take sequences of {known:,} tokens or fewer, or rope_parameters of another "
                "type, such as yarn"
            )
    if getattr(config, "attn_temperature_tuning", False) and sequence_length >= config.floor_scale:
        raise UserError(
            f"{what}: a {config.model_type} model scales its queries by the place in a row, not in a document that "
            f"{by} keeps apart, from token {config.floor_scale:,} on, and sequences have {sequence_length:,}: leave it "
            f"out, or take sequences of fewer than {config.floor_scale:,} tokens"
        )


def head_dim(config: PretrainedConfig) -> int:
    """The width of one attention head, of the widest ones; of latent attention, of its part that is turned."""
    return max(map(_head_dim, layer_configs(config)))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def has_experts(config: PretrainedConfig) -> bool:
    """Whether a model has layers with experts: in some families a config switches them off."""
    return family(config).experts is not None and bool(getattr(config, "enable_moe_block", True))


def keep_layers(config: PretrainedConfig, layers: Sequence[int]) -> None:
    """Makes a config that of a model with these layers of its own alone, in order: what it says by layer is cut."""
    keep_unequal_layers(config, layers)
    for name in ("layer_types", *family(config).by_layer):
        if isinstance(getattr(type(config), config.attribute_map.get(name, name), None), property):
            continue  # Falcon-H1's layers are all alike, by its class
        if values := getattr(config, name, None):
            setattr(config, name, [values[layer] for layer in layers])
    if getattr(config, "indexer_types", None):  # no stage begins without one; a layer alone is counted with its own
        config.indexer_types[0] = "full"
    if hasattr(config, "mlp_only_layers"):  # counted from the first layer of the whole model
        config.mlp_only_layers = [place for place, layer in enumerate(layers) if not _has_experts(config, layer)]
        config.decoder_sparse_step = 1
    if getattr(config, "moe_layers", None) is not None:
        config.moe_layers = [place for place, layer in enumerate(layers) if layer in config.moe_layers]
    if hasattr(config, "first_k_dense_replace") and "mlp_layer_types" not in family(config).by_layer:
        config.first_k_dense_replace = sum(not _has_experts(config, layer) for layer in layers)
    if hasattr(config, "moe_layer_start_index"):
        sparse = [place for place, layer in enumerate(layers) if _has_experts(config, layer)]
        config.moe_layer_start_index, config.moe_layer_end_index = (sparse[0], sparse[-1]) if sparse else (0, -1)


def forward_inputs(decoder: Any, x: Tensor, positions: Tensor | None, tokens: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of the decoder's forward pass: `x` is tokens [B, S], or hidden states [B, S, E].

    `tokens` [B, S]: of hidden states, for a stage whose layers read inputs of their own (`has_per_layer_inputs`).

    Of a decoder whose sequences are shared (`share_sequences`), `x` is this rank's part: [B, S / n], [B, S / n, E].
    `positions` [B, S] int64 restart at 0 where a document begins, and no token attends to one of another document.
    None: a row is one document. The pass has no host-device sync, but with rotary embeddings whose stretch depends on
    the length of a sequence ("dynamic", "longrope"): transformers then reads the largest position, one sync.
    """
    assert positions is None or not family(decoder.config).recurrent, "see refuse_documents"
    name = "input_ids" if x.dim() == 2 else "inputs_embeds"
    part: SequencePart = getattr(decoder, "sequence_part", SequencePart())
    shape = (x.shape[0], x.shape[1] * part.parts)
    position_ids = positions
    if part.parts > 1:
        position_ids = part.of(torch.arange(shape[1], device=x.device).unsqueeze(0) if positions is None else positions)
    attention = attention_inputs(
        decoder.config,
        positions,
        shape,
        by_kind=family(decoder.config).masks_by_kind,
        dtype=next(decoder.parameters()).dtype,
        device=x.device,
    )
    if x.dim() > 2 and has_per_layer_inputs(decoder.config):
        assert tokens is not None, "its layers' inputs follow from the tokens"
        attention["per_layer_inputs"] = per_layer_inputs(decoder, tokens)
    return {name: x, "position_ids": position_ids, **attention, "use_cache": False}


def logit_transform(config: Any) -> LogitTransform:
    """The transform of the head's products into logits, by the config keys of transformers' families.

    Gemma bounds them (`final_logit_softcapping`), Cohere and Falcon-H1 multiply them (`logit_scale`,
    `lm_head_multiplier`), Granite divides them (`logits_scaling`). A key has no effect where it is absent or None, nor
    where the family does not declare it: transformers keeps and ignores it.

    Raises:
        ValueError, ZeroDivisionError: a softcap that is not positive, or a scale that is 0.
    """
    declared = {field.name for field in fields(config)}
    softcap, *multiplied, divided = (
        getattr(config, name) if name in declared else None
        for name in ("final_logit_softcapping", "logit_scale", "lm_head_multiplier", "logits_scaling")
    )
    scale = math.prod(float(each) for each in multiplied if each is not None)
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
    _prepare(model)
    return model


def build_on_meta(config: PretrainedConfig, *, attention: str | None = None) -> PreTrainedModel:
    """The whole model with its head on meta, built from its class, as `build_decoder` says."""
    config = copy.deepcopy(config)
    config._attn_implementation = transformers_attention(config, attention)
    config.pad_token_id = None
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    _prepare(model)
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
    keep_layers(config, layers)
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_MAPPING[type(config)](config)
    _prepare(model)
    return model


def _prepare(model: PreTrainedModel) -> None:
    """Prepares a model that transformers has just built: names of its modules, and calls without a mask."""
    rename_modules(model, model.config.model_type)
    omit_empty_masks(decoder(model))
    if model.config.model_type == "llama4_text":
        use_own_tokens(decoder(model))


def expert_layers(config: PretrainedConfig) -> list[int]:
    """Numbers of the layers with experts; none for a dense model."""
    layers = range(config.num_hidden_layers if has_experts(config) else 0)
    return [layer for layer in layers if _has_experts(config, layer)]


def _has_experts(config: PretrainedConfig, layer: int) -> bool:
    """transformers' rules for mixtures that have dense layers as well."""
    if "mlp_layer_types" in family(config).by_layer:
        return bool(config.mlp_layer_types[layer] == "sparse")
    if getattr(config, "moe_layers", None) is not None:
        return layer in config.moe_layers
    if hasattr(config, "mlp_only_layers"):
        return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    if "moe" in family(config).layer_kinds:
        return bool(config.layer_types[layer] == "moe")
    if hasattr(config, "moe_layer_start_index"):
        return bool(config.moe_layer_start_index <= layer <= config.moe_layer_end_index)
    return layer >= getattr(config, "first_k_dense_replace", 0)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: embedding, layers, last norm. A decoder is its own decoder."""
    inner: PreTrainedModel = model.base_model
    return getattr(inner, "model", inner)  # Llama 4's says another name of it than it has


def rebuild_buffers(model: PreTrainedModel) -> None:
    """Computes again what is in no checkpoint, on the device of the parameters. Call it outside `zero.Init`.

    The rotary embedding in float32, local and global where a family has both: a model built on meta has none, and
    `zero.Init` casts it to bfloat16, which turns position 8192 by up to 22 rad (trap 1 there). Computed on the CPU, as
    `from_pretrained` does. And the factor of Gemma's embeddings, which the embedding itself applies (so it scales on
    the first stage alone) after rounding it to the weights' type.
    """
    inner = decoder(model)
    device = next(inner.parameters()).device
    if hasattr(inner, "rotary_emb"):  # Nemotron-H's attention turns nothing
        with torch.device("cpu"):
            rotary = type(inner.rotary_emb)(config=inner.config)
        assert all(buffer.dtype == torch.float32 for buffer in rotary.buffers())
        inner.rotary_emb = rotary.to(device)
    _rebuild_constants(inner)
    embeddings: tuple[Any, ...] = (inner.embed_tokens, getattr(inner, "embed_tokens_per_layer", None))
    for embedding in embeddings:
        if hasattr(embedding, "embed_scale"):
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, dtype=torch.float32, device=device)


def _rebuild_constants(inner: Any) -> None:
    """Constants of Gemma 3n's and Falcon-H1's modules, in the type of the parameters, as transformers has them."""
    parameter = next(inner.parameters())
    to: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
    width = inner.config.hidden_size
    if hasattr(inner, "per_layer_projection_scale"):
        inner.per_layer_projection_scale = torch.tensor(width**-0.5, **to)
        inner.per_layer_input_scale = torch.tensor(1 / math.sqrt(2.0), **to)
    for layer in inner.layers:
        if hasattr(layer, "altup"):
            layer.altup.router_input_scale = torch.tensor(width**-1.0, **to)
        if hasattr(layer, "mamba"):
            multipliers = sys.modules[type(layer).__module__].compute_mup_vector
            layer.mamba.mup_vector = multipliers(inner.config).to(**to)


def parameter_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Name -> shape of each parameter of transformers' model, the head's included; a tied head has none of its own."""
    return {name: parameter.shape for name, parameter in build_on_meta(config).named_parameters()}


def stored_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> each buffer that a checkpoint holds: biases of routers, which no gradient moves."""
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def constant_buffers(config: PretrainedConfig) -> dict[str, Tensor]:
    """Name -> each buffer that a checkpoint of a student holds: nothing moves them, so all have their family's values.

    Raises:
        KeyError: a buffer of a family that can only teach.
    """
    values = dict(family(config).constants)
    buffers = stored_buffers(build_on_meta(config))
    return {name: torch.full(each.shape, values[name.rpartition(".")[2]]) for name, each in buffers.items()}


def stored_parts(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Name -> shape of all that a checkpoint holds of transformers' model: `parameter_shapes`, and buffers."""
    model = build_on_meta(config)
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *stored_buffers(model).items()]}


def tensor_type(config: PretrainedConfig, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a parameter or buffer in a model of `dtype`: float32 where transformers keeps it so in 16 bits."""
    wide = MODEL_MAPPING[type(config)]._keep_in_fp32_modules_strict or ()
    if dtype.itemsize == 2 and any(re.search(each.replace("*", ".*"), name) for each in wide):
        return torch.float32
    return dtype
