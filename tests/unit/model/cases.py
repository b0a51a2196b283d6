"""Tiny random models of every supported family, with what bites when a model is cut: windows, biases, layer kinds."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megadistill.model.families import load_config

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
}


def whole_model(case: str, *, seed: int = 0) -> Any:
    """The unsplit transformers model, with norms and biases that are not one and zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(load_config(CASES[case], what=case), attn_implementation="sdpa")
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
