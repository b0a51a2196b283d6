"""A tiny recipe that is planned in milliseconds, and a GPU that it does not fit."""

import json
from functools import cache
from typing import Any

from megadistill.accelerators import Accelerator
from megadistill.config.load import validate_recipe
from megadistill.models.families import load_config
from megadistill.plan.counts.model_stats import RecipeStats, measure_models
from megadistill.plan.layouts import Cluster
from megadistill.plan.plan_input import PlanInput

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


SLOWER = 10_000.0
"""Slowness of the GPU of the tests: so slow that the tiny recipe's arithmetic takes longer than launches of kernels."""


def gpu(*, memory_gb: float = 80.0, slower: float = SLOWER) -> Accelerator:
    return Accelerator(
        name="a GPU of the tests",
        peak_tflops={"bfloat16": 100.0 / slower, "float32": 10.0 / slower},
        memory_gb=memory_gb,
        memory_gb_per_s=1000.0 / slower,
        node_gb_per_s=100.0 / slower,
        network_gb_per_s=10.0 / slower,
        source="invented",
    )


def cluster(nodes: int = 1, gpus_per_node: int = 4, *, memory_gb: float = 80.0, slower: float = SLOWER) -> Cluster:
    return Cluster(nodes, gpus_per_node, gpu(memory_gb=memory_gb, slower=slower))


@cache
def _stats(teacher: str) -> RecipeStats:
    student, other = load_config(TINY, what="test"), json.loads(teacher)
    other = None if other is None else load_config(other, what="test")
    return measure_models(student, other, sequence_length=32)


def plan_input(
    *, teacher: dict[str, Any] | None = TINY, placement: dict[str, Any] | None = None, **sections: dict[str, Any]
) -> PlanInput:
    """`sections` are merged into the recipe's own. `teacher` is its model, None for a run from labels; `placement` is
    merged into its section."""
    values: dict[str, Any] = {
        "objective": "labels" if teacher is None else "distill",
        "run": {"folder": "run"},
        "data": {"manifest": "manifest.json"},
        "student": {"config": TINY, "vocab_multiple": 48},  # 288 rows: whole ones on 1 to 4, 6, 8 and 12 ranks
        "train": {
            "steps": 100,
            "global_batch": 24,
            "micro_batch": 1,
            "precision": "float32",
            "optimizer": {"learning_rate": 1e-3},
        },
        "teacher": None if teacher is None else {"path": "teacher", **(placement or {})},
    }
    for name, section in sections.items():
        values[name] = {**(values.get(name) or {}), **section}
    return PlanInput(
        recipe=validate_recipe(values, source="test"),
        stats=_stats(json.dumps(teacher)),
        vocab_size=250,
        deepspeed_config={
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "reduce_bucket_size": 1000},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        without_data=True,
    )
