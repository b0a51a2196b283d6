"""Tiny random models of every supported family, with what bites when a model is cut: windows, biases, layer kinds."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megadistill.models.families import load_config, transformers_attention

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


def whole_model(case: str, *, seed: int = 0) -> Any:
    """The unsplit transformers model, with norms and biases that are not one and zero.

    The attention is named: transformers 5.17 would give Gemma 2 torch's own, without the softcap on its scores.
    """
    torch.manual_seed(seed)
    config = load_config(CASES[case], what=case)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=transformers_attention(config, None))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def saved_model(case: str, folder: Path, *, shard_size: str = "5GB", seed: int = 0) -> Any:
    """The unsplit model, also saved to `folder` by transformers."""
    model = whole_model(case, seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def final_hidden(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden
