"""Bounds of the numbers in a model's config, inline or of a folder, far above those of any model.

transformers takes any number. What is beyond ends in a traceback, in gigabytes, or in a model of NaN.
"""

import math
from collections.abc import Iterator
from typing import Any

from megadistill.errors import UserError

MAX_NUMBER = 1e15
"""Bound of a key that has none of its own."""

_SIZE = (1, 10**6)
_PROBABILITY = (0, 1)
BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 10**7),
    "hidden_size": _SIZE,
    "intermediate_size": (1, 10**7),
    "moe_intermediate_size": (1, 10**7),
    "head_dim": (1, 10**5),
    "q_lora_rank": _SIZE,
    "kv_lora_rank": _SIZE,
    "qk_rope_head_dim": (1, 10**5),
    "qk_nope_head_dim": (1, 10**5),
    "v_head_dim": (1, 10**5),
    "linear_conv_kernel_dim": (1, 10**3),
    "linear_key_head_dim": (1, 10**5),
    "linear_value_head_dim": (1, 10**5),
    "linear_num_key_heads": (1, 10**4),
    "linear_num_value_heads": (1, 10**4),
    "full_attention_interval": (1, 10**4),
    "mamba_num_heads": (1, 10**5),
    "mamba_head_dim": (1, 10**5),
    "ssm_state_size": (1, 10**5),
    "n_groups": (1, 10**5),
    "conv_kernel": (1, 10**3),
    "chunk_size": (1, 10**5),
    "moe_latent_size": (1, 10**6),
    "moe_shared_expert_intermediate_size": (1, 10**7),
    "mamba_n_groups": (1, 10**5),
    "mamba_d_conv": (1, 10**3),
    "mamba_d_ssm": (1, 10**7),
    "mamba_d_head": (1, 10**5),
    "mamba_d_state": (1, 10**5),
    "mamba_n_heads": (1, 10**5),
    "attention_chunk_size": (1, 10**10),
    "floor_scale": (1, 10**10),
    "index_topk": (1, 10**10),
    "index_n_heads": (1, 10**5),
    "index_head_dim": (1, 10**5),
    "global_head_dim": (1, 10**5),
    "num_global_key_value_heads": _SIZE,
    "num_kv_shared_layers": (0, 10**4),
    "hidden_size_per_layer_input": (0, 10**6),
    "vocab_size_per_layer_input": (1, 10**7),
    "top_k_experts": _SIZE,
    "altup_num_inputs": (2, 64),
    "altup_active_idx": (0, 63),
    "laurel_rank": (1, 10**6),
    "intermediate_size_mlp": (1, 10**7),
    "interleave_moe_layer_step": (1, 10**4),
    "mamba_chunk_size": (1, 10**5),
    "num_hidden_layers": (1, 10**4),
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "num_experts": _SIZE,
    "num_local_experts": _SIZE,
    "n_routed_experts": _SIZE,
    "n_shared_experts": (0, 10**6),
    "n_group": _SIZE,
    "topk_group": _SIZE,
    "moe_num_experts": _SIZE,
    "moe_num_shared_experts": (0, 10**6),
    "moe_k": _SIZE,
    "moe_norm_min": (0, 1),
    "first_k_dense_replace": (0, 10**4),
    "moe_layer_start_index": (0, 10**4),
    "moe_layer_end_index": (-1, 10**4),
    "shared_expert_intermediate_size": (1, 10**7),
    "swiglu_limit": (1e-6, 1e6),
    "num_experts_per_tok": _SIZE,
    "max_position_embeddings": (1, 10**10),
    "original_max_position_embeddings": (1, 10**10),
    "sliding_window": (1, 10**10),
    "rope_theta": (1, 1e15),
    "rotary_emb_base": (1, 1e15),
    "rotary_pct": (0, 1),
    "rope_local_base_freq": (1, 1e15),
    "rms_norm_eps": (0, 1),
    "layer_norm_eps": (0, 1),
    "norm_epsilon": (0, 1),
    "partial_rotary_factor": (0, 1),
    "logit_scale": (1e-6, 1e6),
    "logits_scaling": (1e-6, 1e6),
    "no_rope_layer_interval": (1, 10**4),
    "initializer_range": (0, 1e3),
    "attention_dropout": _PROBABILITY,
    "router_aux_loss_coef": (0, 10**6),
    "router_z_loss_coef": (0, 10**6),
    "router_jitter_noise": _PROBABILITY,
    "embd_pdrop": _PROBABILITY,
    "embedding_dropout": _PROBABILITY,
    "hidden_dropout": _PROBABILITY,
    "resid_pdrop": _PROBABILITY,
    "residual_dropout": _PROBABILITY,
}
"""Key, at any depth -> least and largest value."""


def refuse_extreme_numbers(keys: Any, what: str) -> None:
    """Refuses numbers outside of `BOUNDS`, and those that are not finite.

    Raises:
        UserError: names the key, the value and the bound.
    """
    for path, name, value in _numbers(keys, ()):
        least, largest = BOUNDS.get(name, (-MAX_NUMBER, MAX_NUMBER))
        if not least <= value <= largest:  # NaN fails both
            bounds = " to ".join(
                f"{bound:,}" if abs(bound) < MAX_NUMBER else f"{bound:g}" for bound in (least, largest)
            )
            raise UserError(f"{what}: {path} is {_number_text(value)}; give a number from {bounds}")


def _number_text(number: float) -> str:
    is_long = isinstance(number, int) and abs(number) >= 10**40  # of thousands of digits, if somebody wants that
    return f"about 1e{math.floor(math.log10(abs(number)))}" if is_long else str(number)


def _numbers(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, int | float]]:
    """Each number: its dotted key, and the name of the mapping's key that has it, lists aside."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _numbers(child, (*path, str(key)))
    elif isinstance(value, list):
        for child in value:
            yield from _numbers(child, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield ".".join(path), path[-1] if path else "", value
