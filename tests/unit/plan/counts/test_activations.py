"""Activations on fake tensors, against those that torch saves of real ones; tests/ranks/plan has the backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megadistill.config.recipe import CHECKPOINTING
from megadistill.models.families import build_decoder, forward_inputs, load_config, rebuild_buffers
from megadistill.plan.counts.activations import Activations, Peak, Traffic, count_activations

S = 64
SIZES: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3"},
    "olmo2": {"model_type": "olmo2"},
    "gemma2, every other layer a window": {"model_type": "gemma2", "sliding_window": 16},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 16},
    "mistral, a window": {"model_type": "mistral", "sliding_window": 16},
    "qwen3_moe, half dense": {
        "model_type": "qwen3_moe",
        "mlp_only_layers": [0, 1],
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def _config(case: str) -> Any:
    return load_config({**SIZES, **CASES[case]}, what="test")


def _saved_by_torch(config: Any, dtype: torch.dtype, *, masked: bool) -> int:
    """Bytes of the storages that autograd saves of a real forward pass, and of its output; without parameters."""
    decoder: Any = build_decoder(config, layers=range(config.num_hidden_layers))
    for name, parameter in list(decoder.named_parameters()):
        module, _, leaf = name.rpartition(".")
        values = 0.02 * torch.randn(parameter.shape, dtype=dtype)
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(values))
    rebuild_buffers(decoder)
    decoder.train()
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hidden = torch.randn(1, S, config.hidden_size, dtype=dtype, requires_grad=True)
    positions = torch.arange(S).remainder(24).unsqueeze(0) if masked else None
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = decoder(**forward_inputs(decoder, hidden, positions)).last_hidden_state
    saved[out.untyped_storage()._cdata] = out
    for parameter in decoder.parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("case", CASES)
def test_saved_bytes_are_those_of_torch(case: str, masked: bool) -> None:
    config = _config(case)
    dtype = torch.bfloat16 if case.startswith("qwen3_moe") else torch.float32
    attention = "eager" if case.startswith("gemma2") else "sdpa"
    counts = count_activations(config, S, dtype=dtype, masked=masked, attention=attention)
    real = _saved_by_torch(config, dtype, masked=masked)
    assert counts.saved + counts.norm + counts.shared == pytest.approx(real, rel=0.02)


def test_bfloat16_saves_what_its_norms_compute_in_float32() -> None:
    config = _config("llama")
    half, whole = (
        count_activations(config, S, dtype=dtype, masked=False, attention="sdpa")
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.saved + half.norm + half.shared == pytest.approx(
        _saved_by_torch(config, torch.bfloat16, masked=False), rel=0.02
    )
    assert 0.5 * whole.saved < half.saved < whole.saved


def test_layers_of_a_kind_are_alike() -> None:
    two_layers = load_config({**SIZES, "model_type": "llama", "num_hidden_layers": 2}, what="test")
    for mode in CHECKPOINTING:
        four, two = (
            count_activations(config, S, dtype=torch.float32, masked=False, attention="sdpa", checkpointing=mode)
            for config in (_config("llama"), two_layers)
        )
        assert four.saved == 2 * two.saved
        assert (four.forward, four.backward) == (two.forward, two.backward)
    assert four.saved == 4 * S * 64 * 4, "inputs alone"


def test_a_float32_mixture_is_twice_one_in_bfloat16() -> None:
    config = _config("qwen3_moe, half dense")
    half, whole = (
        count_activations(config, S, dtype=dtype, masked=False, attention="sdpa")
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert isinstance(whole, Activations)
    assert (whole.saved, whole.backward.bytes(3)) == (2 * half.saved, 2 * half.backward.bytes(3))


@pytest.mark.parametrize("masked", [False, True])
def test_a_dynamic_rotary_embedding_is_counted_without_asking_for_a_position(masked: bool) -> None:
    plain, dynamic = (
        count_activations(
            load_config({**SIZES, "model_type": "llama", **more}, what="test"),
            S,
            dtype=torch.bfloat16,
            masked=masked,
            attention="sdpa",
        )
        for more in ({}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    )
    assert dynamic == plain


def test_the_highest_moment_depends_on_the_micro_batch() -> None:
    """A weight's gradient is as large for one sequence as for many."""
    peak = Peak.over([(0, 5), (10, 1), (10, 0), (3, 4), (0, 2)])
    assert peak.moments == ((10, 1), (3, 4), (0, 5))
    assert [peak.bytes(sequences) for sequences in (1, 2, 3, 10)] == [11, 12, 15, 50]


def test_traffic_of_scores_is_that_of_the_operators_in_memory() -> None:
    """Counted on meta tensors by hand: 44 bytes a score of softcapped attention forward, 50 back; in blocks none."""
    config = _config("gemma2, every other layer a window")
    scores = 4 * 4 * 256 * 256  # layers, heads, tokens
    eager, flex = (
        count_activations(config, 256, dtype=torch.bfloat16, masked=False, attention=attention)
        for attention in ("eager", "flex")
    )
    assert eager.score_traffic == Traffic(44 * scores, 50 * scores)
    assert flex.score_traffic == Traffic()
    assert flex.forward < 0.3 * eager.forward


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_way_of_checkpointing_keeps_less_and_works_with_more(attention: str) -> None:
    none, selective, full = (
        count_activations(
            _config("llama"), S, dtype=torch.bfloat16, masked=False, attention=attention, checkpointing=mode
        )
        for mode in CHECKPOINTING
    )
    assert full.saved < 0.2 * selective.saved < 0.2 * none.saved
    assert full.backward.bytes(1) > selective.backward.bytes(1) > none.backward.bytes(1)
    assert none.elementwise_backward < selective.elementwise_backward <= full.elementwise_backward
