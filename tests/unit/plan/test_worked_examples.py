"""The worked examples of the project's planning arithmetic: published models, 512 and 2,048 H100.

They take all stages as even, so the stages here are; and sequences of 8,192 tokens, which the first one's FLOPs show.
"""

from dataclasses import replace
from typing import Any

import pytest

from megadistill.accelerators import accelerator
from megadistill.config.load import validate_recipe
from megadistill.models.families import load_config
from megadistill.plan.counts.model_stats import RecipeStats, measure_models
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import Cluster, place
from megadistill.plan.plan_input import PlanInput
from megadistill.plan.throughput import MfuAssumption
from megadistill.student.deepspeed_config import load_deepspeed_config
from tests.paths import DS_CONFIGS
from tests.unit.models.test_flops import LLAMA3_8B

LLAMA3_70B = {
    **LLAMA3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "max_position_embeddings": 16_384,
}
LLAMA3_405B = {
    **LLAMA3_70B,
    "hidden_size": 16_384,
    "intermediate_size": 53_248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
GEMMA2_27B = {
    "model_type": "gemma2",
    "vocab_size": 256_128,
    "hidden_size": 4608,
    "intermediate_size": 36_864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}
TRILLION = 1e12
TUNED = MfuAssumption(0.40, 0.45)
"""Shares of the arithmetic: Megatron-LM's, of tuned training with tensor parallelism."""
_MEASURED: dict[str, RecipeStats] = {}


def _estimate(
    student: dict[str, Any], teacher: dict[str, Any] | None, *, nodes: int, stages: int, sequence_length: int
) -> Estimate:
    recipe = validate_recipe(
        {
            "objective": "labels" if teacher is None else "distill",
            "run": {"folder": "run"},
            "data": {"manifest": "manifest.json"},
            "student": {"config": student, "activation_checkpointing": "full"},
            "train": {
                "steps": 1000,
                "global_batch": 8 * nodes,
                "micro_batch": 1,
                "optimizer": {"learning_rate": 1e-3},
            },
            "distributed": {"vocab_group": stages},
            "teacher": None if teacher is None else {"path": "teacher"},
        },
        source="test",
    )
    key = f"{student} {teacher} {sequence_length}"
    if key not in _MEASURED:
        models = load_config(student, what="test"), None if teacher is None else load_config(teacher, what="test")
        _MEASURED[key] = measure_models(*models, sequence_length=sequence_length)
    inputs = PlanInput(
        recipe,
        _MEASURED[key],
        vocab_size=student["vocab_size"],
        deepspeed_config=load_deepspeed_config(DS_CONFIGS / "zero3.json"),
        without_data=True,
    )
    cluster = Cluster(nodes, 8, accelerator("h100"))
    return estimate(place(recipe, inputs, cluster), cluster, TUNED)


def _days(result: Estimate) -> float:
    return TRILLION / result.tokens_per_second / 86_400


def test_27b_to_8b_on_512() -> None:
    student = {**LLAMA3_8B, "vocab_size": 256_128}
    result = _estimate(student, GEMMA2_27B, nodes=64, stages=2, sequence_length=8192)
    trained, teacher = result.requirements.models
    assert teacher.flops == pytest.approx(57.5e9, rel=0.002)
    assert trained.flops == pytest.approx(70.7e9, rel=0.002)
    assert replace(result, times=result.times.without_latency).tokens_per_second == pytest.approx(1.66e6, rel=0.01)
    assert result.tokens_per_second == pytest.approx(1.64e6, rel=0.005), "waits for latency"
    assert _days(result) == pytest.approx(7.0, abs=0.1)
    assert _days(result) * 24 * 512 == pytest.approx(86_000, rel=0.01)
    labels = _estimate(student, None, nodes=64, stages=8, sequence_length=8192)
    assert _days(labels) == pytest.approx(4.1, abs=0.1)


def test_the_largest_stage_sets_the_pace() -> None:
    """46 layers over 8 stages are 6 at most, where 5.75 would be even."""
    student = {**LLAMA3_8B, "vocab_size": 256_128}
    even, uneven = (_estimate(student, GEMMA2_27B, nodes=64, stages=stages, sequence_length=8192) for stages in (2, 8))
    head = 2 * 256_128 * 4608
    stages_share = (57.5e9 - head) / 0.45 / (57.5e9 / 0.45 + 70.7e9 / 0.40)
    slower = 1 + stages_share * (6 / 5.75 - 1)
    assert even.tokens_per_second / uneven.tokens_per_second == pytest.approx(slower, rel=0.01)


def test_405b_to_70b_on_2048() -> None:
    """0.57 Mtok/s and 20.4 days are those of sequences of 16,384 tokens; with 8,192 it is 0.60."""
    result = _estimate(LLAMA3_70B, LLAMA3_405B, nodes=256, stages=2, sequence_length=16_384)
    assert result.tokens_per_second == pytest.approx(0.57e6, rel=0.01)
    assert _days(result) == pytest.approx(20.4, rel=0.015)


def test_the_micro_step_that_hides_zero_3() -> None:
    """A micro-step of that many tokens takes as long for its compute as for its weights and gradients."""
    result = _estimate(LLAMA3_8B, None, nodes=64, stages=8, sequence_length=8192)
    share = result.hiding_tokens / result.sharding.tokens
    assert result.times.gather + result.times.reduce == pytest.approx(share * result.times.compute)
