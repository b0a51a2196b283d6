"""Parameters and FLOPs, against published counts, the arithmetic written out and torch's own counter."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megadistill.models.families import load_config
from megadistill.models.flops import flops_per_token, layer_costs, parameter_counts
from tests.unit.models.cases import ALL_CASES, CASES, MORE_CASES, VOCAB, whole_model

LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
QWEN3_06B = {  # tied, with heads of their own width
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def test_published_parameter_counts() -> None:
    llama = parameter_counts(load_config(LLAMA3_8B, what="test"))
    assert llama.total == 8_030_261_248
    assert llama.embedding == llama.head == 128_256 * 4096
    qwen = parameter_counts(load_config(QWEN3_06B, what="test"))
    assert (qwen.total, qwen.body, qwen.head) == (596_049_920, 440_467_456, 0)


def test_the_formula_on_a_published_model() -> None:
    flops = flops_per_token(load_config(LLAMA3_8B, what="test"), 8192)
    assert flops.body == 2 * 6_979_588_096
    assert flops.head == 2 * 128_256 * 4096
    assert flops.attention == 2 * 32 * 8192 * 4096
    assert flops.forward == flops.body + flops.head + flops.attention
    qwen = flops_per_token(load_config(QWEN3_06B, what="test"), 100)
    assert qwen.head == 2 * 151_936 * 1024, "a tied head is multiplied all the same"
    assert qwen.attention == 2 * 28 * 100 * 16 * 128, "the width of attention is not that of the model"


MIXTRAL_8X7B = {"model_type": "mixtral"}  # transformers' own defaults
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


@pytest.mark.parametrize(
    ("mapping", "total", "active"),
    [(MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248), (QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704)],
    ids=["Mixtral 8x7B: 46.7B, 12.9B active", "Qwen3 30B A3B: 30.5B, 3.3B active"],
)
def test_published_counts_of_mixtures(mapping: dict[str, Any], total: int, active: int) -> None:
    """Published active counts include embedding and head; FLOPs count neither embedding nor idle experts."""
    config = load_config(mapping, what="test")
    counts = parameter_counts(config)
    assert counts.total == total
    assert counts.active_body + counts.embedding + counts.head == active
    assert flops_per_token(config, 1).body == 2 * counts.active_body
    assert sum(layer_costs(config)) == counts.active_body - config.hidden_size, "all but the last norm"


def test_layers_cost_what_they_hold_and_no_more() -> None:
    """Layers 1 and 4 have 6 experts of 40, of which a token takes 3; the others are dense, 96 wide."""
    dense, sparse = layer_costs(load_config(CASES["qwen3_moe"], what="test"))[:2]
    attention = 64 * 24 * (4 + 2 + 2 + 4) + 2 * 64 + 2 * 24
    assert dense == attention + 3 * 64 * 96
    assert sparse == attention + 64 * 6 + 3 * (3 * 64 * 40)
    assert layer_costs(load_config(CASES["qwen3_moe"], what="test")) == [dense, sparse, dense, dense, sparse]


QUICK = ["llama", "llama-tied", "qwen3", "gemma2", "gemma3", "olmo2", "mixtral", "qwen3_moe", "phi3"]


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(name, marks=pytest.mark.thorough) for name in MORE_CASES if name not in QUICK)]
)
def test_torch_counts_the_same(case: str) -> None:
    """torch counts masked scores too, so twice the causal attention, and neither norms nor biases."""
    model, sequence = whole_model(case), 24
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # a fused kernel is one operation that the counter does not know
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(VOCAB, (1, sequence)), use_cache=False)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    # Biases of gpt-oss's experts, of which a token has two of four.
    vectors += sum(p.numel() // 2 for name, p in model.named_parameters() if name.endswith("proj_bias"))
    flops = flops_per_token(load_config(ALL_CASES[case], what="test"), sequence)
    expected = sequence * (flops.body - 2 * vectors + flops.head + 2 * flops.attention)
    # rotary embeddings and the like are under a percent
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
