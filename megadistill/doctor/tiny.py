"""A tiny model of the same architecture, for a dry run.

Width, depth, experts and vocabulary are small; the size of a head, the kinds of layers and the logit transform stay, so
that the same kernels and the same code run.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megadistill.models.configs.unequal_layers import first_layers, layer_configs, set_heads_of_keys
from megadistill.models.families import ModelConfig, expert_layers, family, head_dim, keep_layers
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs
from megadistill.models.initial_weights import initial_tensor
from megadistill.models.module_names import stored_name
from megadistill.models.weights import stored_shapes

HEADS, EXPERTS, EXPERTS_PER_TOKEN = 4, 4, 2


def tiny_config(config: ModelConfig, *, vocab_size: int, min_layers: int) -> ModelConfig:
    """A small config with each kind of layer of `config` at least once; at least `min_layers` may begin a stage."""
    small = copy.deepcopy(config)
    widths = {head_dim(each) for each in layer_configs(config)}
    # Gemma 4's wider heads have 512 columns, and Gemma 3n's layers several projections of the width.
    heads = min(HEADS // max(len(widths), 2 if has_per_layer_inputs(config) else 1), config.num_attention_heads)
    kinds = _kinds_of_layers(config)
    layers = max(min_layers, len(kinds))
    width = min(widths)
    small.num_attention_heads = heads
    alike = all(each.num_key_value_heads == each.num_attention_heads for each in layer_configs(config))
    small.num_key_value_heads = heads if alike else 1
    small.hidden_size = heads * width
    small.intermediate_size = 2 * small.hidden_size
    if "intermediate_size" in family(config).by_layer:
        small.intermediate_size = [small.intermediate_size] * config.num_hidden_layers
    if hasattr(config, "intermediate_size_mlp"):
        small.intermediate_size_mlp = 2 * small.hidden_size
    small.vocab_size = vocab_size
    # Gemma 4 ends in a layer of full attention, the last of its kinds.
    chosen = [kinds[(layer - layers) % len(kinds)] for layer in range(layers)]
    keep_layers(small, [0] * (min_layers - _stages(config, chosen)) + chosen)
    set_heads_of_keys(small, 1)
    if has_per_layer_inputs(config):
        small.vocab_size_per_layer_input = vocab_size
    for name, most in (
        ("num_experts", EXPERTS),
        ("num_local_experts", EXPERTS),
        ("num_experts_per_tok", EXPERTS_PER_TOKEN),
        ("top_k_experts", EXPERTS_PER_TOKEN),
    ):
        if getattr(config, name, None) is not None:
            setattr(small, name, min(most, getattr(config, name)))
    for name in (
        "moe_intermediate_size",
        "moe_latent_size",
        "moe_shared_expert_intermediate_size",
        "shared_expert_intermediate_size",
    ):
        if getattr(config, name, None) is not None:
            setattr(small, name, max(small.hidden_size // 32, 1) * 8)
    for name in ("n_group", "topk_group"):  # of fewer experts than groups
        if hasattr(config, name):
            setattr(small, name, 1)
    if hasattr(config, "index_n_heads"):
        small.index_n_heads = HEADS
    if hasattr(config, "mamba_n_heads"):
        small.mamba_n_heads, small.mamba_n_groups = 2 * HEADS, min(2, config.mamba_n_groups)
        small.mamba_d_ssm = small.mamba_n_heads * config.mamba_d_head
    if hasattr(config, "mamba_num_heads"):
        small.mamba_num_heads, small.n_groups = 2 * HEADS, min(2, config.n_groups)
    if hasattr(config, "linear_num_key_heads"):
        shared = config.linear_num_value_heads // config.linear_num_key_heads
        small.linear_num_key_heads, small.linear_num_value_heads = 2, 2 * shared
    return small


def _kinds_of_layers(config: ModelConfig) -> list[int]:
    """The first layer of each kind, by what the config says of it alone."""
    lists = [values for name in ("layer_types", *family(config).by_layer) if (values := getattr(config, name, None))]
    sparse = set(expert_layers(config))
    first: dict[tuple[Any, ...], int] = {}
    for layer in range(config.num_hidden_layers):
        first.setdefault((layer in sparse, *(values[layer] for values in lists)), layer)
    return list(first.values())


def _stages(config: ModelConfig, layers: list[int]) -> int:
    """Most stages of a model of these layers."""
    part = copy.deepcopy(config)
    keep_layers(part, layers)
    return len(first_layers(part))


def write_random(config: ModelConfig, folder: Path, *, seed: int) -> None:
    """A model folder with `config` and initial weights, the same wherever it is written."""
    config.save_pretrained(folder)
    norm = family(config).norm_init
    tensors = {
        name: initial_tensor(name, shape, std=config.initializer_range, seed=seed, norm=norm)
        for name, shape in stored_shapes(config).items()
    }
    constants = dict(family(config).constants)
    for name, tensor in tensors.items():
        if (end := name.rpartition(".")[2]) in constants:
            tensor.fill_(constants[end])
    stored = {stored_name(name, config.model_type): tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors")
