"""Two recipes whose requirements the tests know: a tiny one, and Llama-3-8B from a teacher of its size."""

from functools import cache
from typing import Any

from megadistill.config.recipe import LossSection, Recipe
from megadistill.models.families import load_config
from megadistill.plan.counts.model_stats import RecipeStats, measure_models
from megadistill.plan.counts.requirements import Requirements, count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.zero import Zero
from tests.unit.models.test_flops import LLAMA3_8B

LLAMA3_8B_TOTAL, LLAMA3_8B_BODY = 8_030_261_248, 6_979_588_096

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# a layer: q, o 32·32 each; k, v 16·32 each; gate, up, down 32·48 each; two norms of 32
TINY_LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32


def recipe(*, distill: bool, precision: str, global_batch: int, micro_batch: int, **student: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "objective": "distill" if distill else "labels",
            "run": {"folder": "run"},
            "data": {"manifest": "manifest.json"},
            "student": {"config": {"model_type": "llama"}, **student},
            "train": {
                "steps": 100,
                "global_batch": global_batch,
                "micro_batch": micro_batch,
                "precision": precision,
                "optimizer": {"learning_rate": 1e-3},
            },
            "teacher": {"path": "teacher"} if distill else None,
        }
    )


@cache
def stats(*, teacher: bool = False) -> RecipeStats:
    model = load_config(TINY, what="test")
    return measure_models(model, model if teacher else None, sequence_length=32)


def tiny(
    *,
    ranks: int = 2,
    group_size: int = 1,
    global_batch: int = 8,
    deepspeed_config: dict[str, Any] | None = None,
    **student: Any,
) -> Requirements:
    """A tiny student from labels, in float32."""
    section = {"vocab_multiple": 256, **student}
    run = Sharding(
        recipe(distill=False, precision="float32", global_batch=global_batch, micro_batch=2, **section),
        stats(),
        vocab_size=250,
        ranks=ranks,
        ranks_per_node=ranks,
        group_size=group_size,
        zero=Zero.of(deepspeed_config or {}),
    )
    return count_requirements(run)


@cache
def _llamas() -> RecipeStats:
    llama = load_config(LLAMA3_8B, what="test")
    return measure_models(llama, llama, sequence_length=8192)


def large(
    *,
    ranks: int = 64,
    group_size: int = 8,
    ranks_per_node: int = 8,
    loss: dict[str, Any] | None = None,
    deepspeed_config: dict[str, Any] | None = None,
) -> Requirements:
    """Llama-3-8B, from another of its size, in bfloat16 with activation checkpointing: 8 nodes of 8."""
    plain = recipe(distill=True, precision="bfloat16", global_batch=256, micro_batch=1, activation_checkpointing="full")
    run = Sharding(
        plain.model_copy(update={"loss": LossSection.model_validate(loss or {})}),
        _llamas(),
        vocab_size=128_256,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        group_size=group_size,
        zero=Zero.of(deepspeed_config or {}),
    )
    return count_requirements(run)
