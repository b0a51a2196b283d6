"""Tiny random models of every supported family, with what bites when a model is cut: windows, biases, layer kinds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megadistill.models.families import FAMILIES, load_config, stored_buffers, transformers_attention

VOCAB, LAYERS = 250, 5

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}

# What published Gemma configs say of their special tokens; with 0 for the padding, as theirs.
_GEMMA = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "head_dim": 24, "query_pre_attn_scalar": 20}

# A window shorter than the test's sequences; for Qwen on the last three layers only, so that a stage which took the
# kinds of the first layers would be wrong.
_SOME_SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "rope_theta": 5e5},
    "llama-tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True, "attention_bias": True},
    "llama3-rope": {
        "model_type": "llama",
        **SIZES,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 6, "head_dim": 24},
    "qwen2": {"model_type": "qwen2", **SIZES, **_SOME_SLIDING, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, **_SOME_SLIDING, "head_dim": 24},
    # Softcaps so low that they bite; windows on layers 0, 2 and 4.
    "gemma2": {
        "model_type": "gemma2",
        **SIZES,
        **_GEMMA,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    # Global attention on layer 2 alone, with a rotary embedding of its own, stretched as in the larger Gemma 3.
    "gemma3": {
        "model_type": "gemma3_text",
        **SIZES,
        **_GEMMA,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "sliding_window": 6},
    # Experts on layers 1 and 4; with `decoder_sparse_step` on 1 and 3. Both rules count from the whole model's first.
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "head_dim": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 2, 3],
        "norm_topk_prob": True,
    },
    "qwen3_moe-step": {
        "model_type": "qwen3_moe",
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    # Windows on all layers but layer 3 (and positions there are not turned), so the kinds of layers matter in a stage.
    "exaone4": {
        "model_type": "exaone4",
        **SIZES,
        "head_dim": 24,
        "sliding_window": 6,
        "sliding_window_pattern": 4,
        "rope_theta": 1e6,
    },
    "olmo2": {"model_type": "olmo2", **SIZES, "pad_token_id": 1},
}

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"short_factor": [1.0 + place / 8 for place in range(8)], "long_factor": [2.0 + place for place in range(8)]}
_NO_GROUPS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
_FULL, _SLIDING = "full_attention", "sliding_attention"

MORE_CASES: dict[str, dict[str, Any]] = {
    # Every kind of rotary embedding that Llama's class knows, beside llama3's above; the tests' rows are of 20 tokens.
    "llama-linear": {"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-dynamic": {
        "model_type": "llama",
        **SIZES,
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "llama-yarn": {"model_type": "llama", **SIZES, "rope_scaling": _YARN},
    "llama-longrope": {
        "model_type": "llama",
        **SIZES,
        "head_dim": 16,
        "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0, **_LONG},
    },
    "apertus": {"model_type": "apertus", **SIZES, "pad_token_id": 3},
    "arcee": {"model_type": "arcee", **SIZES},
    "cohere": {"model_type": "cohere", **SIZES, "logit_scale": 0.3, "use_qk_norm": True, "pad_token_id": 0},
    "cohere2": {"model_type": "cohere2", **SIZES, "logit_scale": 0.3, "sliding_window": 6, "sliding_window_pattern": 3},
    "cwm": {"model_type": "cwm", **SIZES, "head_dim": 24, "sliding_window": 6},
    "ernie4_5": {"model_type": "ernie4_5", **SIZES, "head_dim": 24, "use_bias": True},
    "gemma": {"model_type": "gemma", **SIZES, "head_dim": 24, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    # Layers of full attention have wider heads, of one head of keys that are values, too. No published size.
    "gemma4": {
        "model_type": "gemma4_text",
        **SIZES,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 6,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
        "final_logit_softcapping": 3.0,
        "pad_token_id": 0,
    },
    "glm": {"model_type": "glm", **SIZES, "head_dim": 24},
    "glm4": {"model_type": "glm4", **SIZES, "head_dim": 24},
    "gpt_neox": {"model_type": "gpt_neox", **_NO_GROUPS, "rotary_pct": 0.5, "use_parallel_residual": True},
    "granite": {
        "model_type": "granite",
        **SIZES,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense",
        **SIZES,
        "head_dim": 24,
        "rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "ministral": {
        "model_type": "ministral",
        **SIZES,
        "head_dim": 24,
        "sliding_window": 6,
        "layer_types": [_SLIDING, _FULL, _FULL, _SLIDING, _SLIDING],
    },
    # Queries are scaled from position 8 of a document on.
    "ministral3": {
        "model_type": "ministral3",
        **SIZES,
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.7,
        },
    },
    # Yarn on layer 3 alone, which has no window.
    "olmo3": {"model_type": "olmo3", **SIZES, "pad_token_id": 1, "sliding_window": 6, "rope_scaling": _YARN},
    "phi3": {"model_type": "phi3", **SIZES, "sliding_window": 6, "partial_rotary_factor": 0.75, "pad_token_id": 0},
    "phi3-longrope": {
        "model_type": "phi3",
        **SIZES,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", **_LONG},
        "pad_token_id": 0,
    },
    "seed_oss": {
        "model_type": "seed_oss",
        **SIZES,
        "head_dim": 24,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    # Each pair of a kind of attention and a kind of position.
    "smollm3": {
        "model_type": "smollm3",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": [_FULL, _SLIDING, _FULL, _SLIDING, _FULL],
        "no_rope_layers": [1, 1, 0, 0, 1],
    },
    "starcoder2": {"model_type": "starcoder2", **SIZES, "sliding_window": 6},
    # Mixtures. Experts on layers 1 to 3 of 5, so that stages have dense layers at either end.
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        **SIZES,
        "head_dim": 24,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 40,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "use_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
    # Two dense layers, then routers by sigmoid that take experts of one of two groups.
    "glm4_moe": {
        "model_type": "glm4_moe",
        **SIZES,
        "head_dim": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    # Windows on layers 0, 2 and 4, and a limit that bites.
    "gpt_oss": {
        "model_type": "gpt_oss",
        **SIZES,
        "head_dim": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "swiglu_limit": 0.2,
    },
    "granitemoe": {
        "model_type": "granitemoe",
        **SIZES,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
    "olmoe": {"model_type": "olmoe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1},
    # Experts on layers 1 and 3.
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
    },
}
"""Families whose tests are thorough but for those of `QUICK`, by a model of each that bites where `CASES` do."""

MORE_CASES = {name: keys for name, keys in MORE_CASES.items() if keys["model_type"] in FAMILIES}  # 5.17 lacks some
if not hasattr(CONFIG_MAPPING["gpt_oss"](), "swiglu_limit"):  # in transformers 5.17 it is always 7
    del MORE_CASES["gpt_oss"]["swiglu_limit"]

QUICK = ("granite", "smollm3")
"""Names in `MORE_CASES` of those whose tests `make test` runs: what the layers do differs by place."""

ALL_CASES = CASES | MORE_CASES

STUDENTS = [name for name, config in ALL_CASES.items() if not FAMILIES[config["model_type"]].teacher_only]
"""Cases of families that can be students as well."""


def all_cases(*quick: str, students: bool = False) -> list[Any]:
    """The names of `ALL_CASES`, as parameters of a test: those of `MORE_CASES` are thorough, but for these.

    `students`: without families that can only teach.
    """
    names = [name for name in MORE_CASES if name in STUDENTS or not students]
    return [*CASES, *(name if name in quick else pytest.param(name, marks=pytest.mark.thorough) for name in names)]


def whole_model(case: str, *, seed: int = 0) -> Any:
    """The unsplit transformers model, with norms and biases that are not one and zero; constants are a student's.

    The attention is named: transformers 5.17 would give Gemma 2 torch's own, without the softcap on its scores.
    """
    torch.manual_seed(seed)
    config = load_config(ALL_CASES[case], what=case)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=transformers_attention(config, None))
    constants = {end for end, _ in FAMILIES[config.model_type].constants}
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *stored_buffers(model).items()]:
            if (parameter.ndim == 1 or name.endswith("_bias")) and name.rpartition(".")[2] not in constants:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def saved_model(case: str, folder: Path, *, shard_size: str = "5GB", seed: int = 0) -> Any:
    """The unsplit model, also saved to `folder` by transformers."""
    model = whole_model(case, seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def final_hidden(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden
