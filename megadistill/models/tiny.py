"""A tiny model of the same architecture, for a dry run.

Width, depth, experts and vocabulary are small; the size of a head, the kinds of layers and the logit transform stay, so
that the same kernels and the same code run.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from megadistill.models.families import family, head_dim
from megadistill.models.initial_weights import initial_tensor
from megadistill.models.weights import stored_shapes

HEADS, EXPERTS, EXPERTS_PER_TOKEN = 4, 4, 2


def tiny_config(config: PretrainedConfig, *, vocab_size: int, min_layers: int) -> PretrainedConfig:
    """A small config with at least `min_layers` layers, and each kind of layer of `config` at least once."""
    small = copy.deepcopy(config)
    heads = min(HEADS, config.num_attention_heads)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))
    layers = max(min_layers, len(kinds))
    width = head_dim(config)
    small.num_attention_heads = heads
    small.num_key_value_heads = heads if config.num_key_value_heads == config.num_attention_heads else 1
    small.hidden_size = heads * width
    small.intermediate_size = 2 * small.hidden_size
    small.num_hidden_layers = layers
    small.vocab_size = vocab_size
    if getattr(config, "layer_types", None):
        small.layer_types = [kinds[layer % len(kinds)] for layer in range(layers)]
    if hasattr(config, "mlp_only_layers"):
        small.mlp_only_layers = []
        small.decoder_sparse_step = 1
    for name, most in (
        ("num_experts", EXPERTS),
        ("num_local_experts", EXPERTS),
        ("num_experts_per_tok", EXPERTS_PER_TOKEN),
    ):
        if hasattr(config, name):
            setattr(small, name, min(most, getattr(config, name)))
    if hasattr(config, "moe_intermediate_size"):
        small.moe_intermediate_size = small.intermediate_size
    return small


def write_random(config: PretrainedConfig, folder: Path, *, seed: int) -> None:
    """A model folder with `config` and initial weights, the same wherever it is written."""
    config.save_pretrained(folder)
    norm = family(config).norm_init
    tensors = {
        name: initial_tensor(name, shape, std=config.initializer_range, seed=seed, norm=norm)
        for name, shape in stored_shapes(config).items()
    }
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors")
