"""A small model of the same architecture: every family builds, and keeps what makes it that family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.doctor.tiny import tiny_config, write_random
from megadistill.models.configs.unequal_layers import first_layers
from megadistill.models.families import FAMILIES, head_dim, load_config, logit_transform, transformers_attention
from megadistill.models.weights import check_weights
from tests.unit.models.cases import CASES

LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


WITHOUT = {"gpt_neox": "num_key_value_heads", "qwen3_5_moe_text": "intermediate_size"}
"""Keys that a family does not have."""

COVERED = {config["model_type"] for config in CASES.values()} | {"smollm3"}


@pytest.mark.parametrize(
    "model_type",
    [name if name in COVERED else pytest.param(name, marks=pytest.mark.thorough) for name in FAMILIES],
)
def test_every_family_shrinks_to_a_model_that_runs(model_type: str, tmp_path: Path) -> None:
    keys = {name: value for name, value in LARGE.items() if name != WITHOUT.get(model_type)}
    if model_type in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa"):  # latent attention has keys for each head
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    large = load_config({"model_type": model_type, **keys}, what="test")
    small = tiny_config(large, vocab_size=300, min_layers=3)
    write_random(small, tmp_path, seed=1)
    read = load_config(tmp_path, what="test")
    check_weights(tmp_path, read)
    attention = transformers_attention(load_config(tmp_path, what="test"), None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    logits = model(torch.arange(8).unsqueeze(0)).logits
    assert logits.shape == (1, 8, 300)
    assert bool(logits.isfinite().all())
    assert sum(parameter.numel() for parameter in model.parameters()) < 30_000_000
    assert head_dim(read) == head_dim(large)
    assert logit_transform(read) == logit_transform(large)
    assert read.num_hidden_layers >= 3
    for name in {"layer_types", *FAMILIES[model_type].by_layer} - {"intermediate_size"}:
        assert set(getattr(read, name, None) or []) == set(getattr(large, name, None) or [])


@pytest.mark.skipif("glm_moe_dsa" not in FAMILIES, reason="this transformers lacks glm_moe_dsa")
def test_a_small_model_of_layers_that_share_has_as_many_stages_as_are_asked_for() -> None:
    """Those that take the keys of another one's indexer begin none."""
    keys = {**LARGE, "num_hidden_layers": 8, "num_key_value_heads": 32, "indexer_types": ["full", "shared"] * 4}
    large = load_config({"model_type": "glm_moe_dsa", **keys}, what="test")
    small = tiny_config(large, vocab_size=300, min_layers=8)
    assert len(first_layers(small)) == 8
    assert set(small.indexer_types) == {"full", "shared"}


def test_a_small_model_does_not_grow() -> None:
    tiny = load_config(
        {"model_type": "llama", **LARGE, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
        what="test",
    )
    small = tiny_config(tiny, vocab_size=300, min_layers=1)
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads) == (64, 2, 1)
    assert small.num_hidden_layers == 1
