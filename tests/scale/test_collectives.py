"""Collectives of a step over 1,536 ranks, and over 64 replicas of 64: how many, over which groups, how small; and a
plan counts the same, each one.

A rank of a world of torch's fake process group runs the run's own step with the real engine. Students have the layers,
vocabularies and settings of the recipes in their proportions, so that as many layers stay gathered.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest

from benchmarks.collective_calls import Collective
from megadistill.accelerators import accelerator
from megadistill.config.recipe import Checkpointing, Recipe
from megadistill.distributed.topology import Topology
from megadistill.models.families import load_config
from megadistill.plan.counts.model_stats import RecipeStats, measure_models
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.step_collectives import (
    ACROSS,
    CONTROL,
    GRADIENTS,
    SCALES,
    WEIGHTS,
    Hidden,
    StepCollectives,
    count_collectives,
)
from megadistill.plan.counts.zero import Zero
from megadistill.plan.layouts import Cluster, place
from megadistill.plan.plan_input import PlanInput, read_plan_input
from megadistill.student.deepspeed_config import RANKS_OF_A_SMALL_WORLD, load_deepspeed_config
from tests.paths import DS_CONFIGS, RECIPES, ROOT
from tests.scale.fake_world import LOCAL_WORLD, build_student, in_fake_world, take_step

WORLD = 1536
TOKENS = 8
LEARNING_MICRO_STEPS = 2
"""Micro-steps in which DeepSpeed records the order of the layers."""
NUMBERS = 1024
"""Bytes that the numbers of a step have at most."""
SMALLEST = 64 << 10
"""Bytes below which a collective over the world is mostly latency."""

NAMES = {
    "allgather_base": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "allreduce": "all-reduce",
    "broadcast": "broadcast",
}

Calls = Counter[tuple[str, int, int]]
"""(kind, ranks of the group, bytes) of the calls."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": WORLD,
}
GEMMA_2B = load_config(RECIPES / "models" / "gemma-2-2b", what="test")
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
}


@dataclass(frozen=True)
class Case:
    """A student and DeepSpeed's file.

    Attributes:
        stays: layers that stay gathered between the passes; None: all.
        bucket: layers whose gradients are reduced together.
        replicas: of the student, on `ranks`.
    """

    deepspeed: str = "hpz.json"
    family: str = "gemma2"
    layers: int = 4
    stays: float | None = 1.5
    bucket: float = 1.5
    accumulation: int = 1
    checkpointing: Checkpointing = "selective"
    sizes: dict[str, Any] = field(default_factory=dict)
    ranks: int = WORLD
    replicas: int = 1

    def __str__(self) -> str:
        parts = (self.deepspeed.removesuffix(".json"), self.family, f"{self.stays} stay", f"{self.accumulation} micro")
        return ", ".join((*parts, f"{self.replicas} x {self.ranks // self.replicas}"))

    @property
    def config(self) -> Any:
        values = {**SIZES, **FAMILIES[self.family], "num_hidden_layers": self.layers, **self.sizes}
        return load_config(values, what="test")

    @property
    def settings(self) -> dict[str, Any]:
        """DeepSpeed's sizes, in layers of this student: the files' own hold all of it."""
        stats = measure_models(self.config, None, sequence_length=TOKENS)
        layer = max(stats.student.layer_parameters)
        settings: dict[str, Any] = {"reduce_bucket_size": int(self.bucket * layer), "zero_quantized_weights": False}
        if self.stays is not None:
            settings["stage3_max_reuse_distance"] = int(self.stays * layer)
        threshold = load_deepspeed_config(DS_CONFIGS / self.deepspeed)["zero_optimization"]
        if threshold["stage3_param_persistence_threshold"]:  # vectors alone are small, as in the large student
            settings["stage3_param_persistence_threshold"] = self.config.hidden_size
        return settings

    def planned(self) -> StepCollectives:
        """The plan's count."""
        train = {"global_batch": self.accumulation * self.ranks, "steps": 10, "micro_batch": 1, "precision": "bfloat16"}
        recipe = Recipe.model_validate(
            {
                "objective": "labels",
                "run": {"folder": "run"},
                "data": {"manifest": "manifest.json"},
                "student": {"config": {"model_type": "llama"}, "vocab_multiple": self.config.vocab_size},
                "train": {**train, "optimizer": {"learning_rate": 1e-3}},
                "loss": {"router_aux_loss_coef": 0.0} if "experts" in str(FAMILIES[self.family]) else {},
            }
        )
        config = load_deepspeed_config(DS_CONFIGS / self.deepspeed)
        config["zero_optimization"].update(self.settings)
        stats = measure_models(self.config, None, sequence_length=TOKENS)
        return count_collectives(
            Sharding(
                recipe,
                RecipeStats(stats.student, None, TOKENS),
                vocab_size=self.config.vocab_size,
                ranks=self.ranks,
                replicas=self.replicas,
                ranks_per_node=LOCAL_WORLD,
                group_size=LOCAL_WORLD,
                zero=Zero.of(config),
            )
        )


def _calls(topology: Topology, case: Case) -> list[Collective]:
    """The calls of a step after those in which DeepSpeed learns the order of the layers."""
    student = build_student(
        topology,
        case.config,
        deepspeed=case.deepspeed,
        settings=case.settings,
        vocab_multiple=case.config.vocab_size,
        activation_checkpointing=case.checkpointing,
        accumulation=case.accumulation,
    )
    calls: list[Collective] = []
    for step in range(1 + LEARNING_MICRO_STEPS // case.accumulation):
        calls = take_step(student, topology, step=step, tokens=TOKENS, accumulation=case.accumulation)
    return calls


def _counted(case: Case) -> Calls:
    """A run's calls. The numbers of a step have no fixed size, as a run adds its flags."""
    first = case.ranks // case.replicas * (case.replicas // 2)  # of a replica in the middle
    calls = in_fake_world(case.ranks, _calls, case, rank=first, replicas=case.replicas)
    return Counter(_call(NAMES[call.name], call.ranks, call.nbytes) for call in calls)


def _planned(collectives: StepCollectives) -> Calls:
    return Counter(_call(each.kind, each.ranks, each.nbytes) for each in collectives)


def _call(kind: str, ranks: int, nbytes: int) -> tuple[str, int, int]:
    is_control = kind in ("all-reduce", "broadcast") and ranks > LOCAL_WORLD and nbytes <= NUMBERS
    return kind, ranks, 0 if is_control else nbytes


CASES = [
    Case(accumulation=2),
    Case("zero3.json", "llama"),
    Case(accumulation=2, sizes={"vocab_size": 4096}, ranks=4096, replicas=64),
    *[
        pytest.param(case, marks=pytest.mark.thorough)
        for case in (
            Case(),
            Case("zero3.json", accumulation=2, checkpointing="full"),
            Case("zeropp.json", "llama"),
            Case("zero3-offload.json"),
            Case("cpu.json", "llama", checkpointing="none"),
            Case("hpz.json", "qwen3_moe", accumulation=2),
            Case("zero3.json", "qwen3_moe", bucket=0.4),
            Case("zero3.json", stays=None),
            Case("zero3.json", "llama", sizes={"vocab_size": 4096}, ranks=4096, replicas=64),
            Case("hpz.json", "qwen3_moe", sizes={"vocab_size": 4096}, ranks=4096, replicas=32),
        )
    ],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_counts_every_collective_of_a_step(case: Case) -> None:
    planned = case.planned()
    assert _counted(case) == _planned(planned)
    shard = case.ranks // case.replicas
    assert max(call.ranks for call in planned) == max(shard, case.replicas)
    gathers = [call for call in planned if call.ranks == shard and call.purpose == WEIGHTS]
    layer = 2 * min(measure_models(case.config, None, sequence_length=TOKENS).student.layer_parameters)
    norms = [call for call in gathers if call.nbytes < layer]
    assert norms == [] or shard <= RANKS_OF_A_SMALL_WORLD, "that gather the last norm by itself"
    once_a_step = load_deepspeed_config(DS_CONFIGS / case.deepspeed)["zero_optimization"].get("zero_hpz_partition_size")
    assert len(gathers) - len(norms) <= (1 if once_a_step else 2 * case.accumulation) * (case.layers + 1)


@pytest.mark.thorough
@pytest.mark.parametrize("deepspeed", ["hpz.json", "zero3.json"])
def test_no_collective_over_the_world_is_small_at_the_true_width(deepspeed: str) -> None:
    """Three layers of Gemma 2 2B with the files' own sizes, and a vocabulary that is larger than a layer."""
    sizes = {name: getattr(GEMMA_2B, name) for name in SIZES} | {"vocab_size": 23 * WORLD}
    case = Case(deepspeed, layers=3, bucket=2.5, stays=1.5, sizes=sizes)
    counted = _counted(case)
    assert counted == _planned(case.planned())
    small = {call: count for call, count in counted.items() if call[1] == WORLD and call[2] < SMALLEST}
    assert small == {("all-reduce", WORLD, 0): 3, ("all-reduce", WORLD, 6144): 1}, "control, and the last norm"


@pytest.mark.parametrize("deepspeed", ["hpz", "zero3", "zero3-offload", "zeropp"])
@pytest.mark.parametrize("name", ["gemma2-27b-to-2b", "gemma2-27b-to-9b", "llama3-70b-to-8b"])
def test_the_recipes_collectives_over_the_world_are_few_and_large(
    name: str, deepspeed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one copy of the student. The count equals a run's. Of the control calls there are three, and one for small
    parameters.

    The layer at which `stage3_max_live_parameters` is reached is gathered by two calls, the second of which may be the
    layer's norms; compute hides it.
    """
    monkeypatch.chdir(ROOT)
    run = _recipe(name, deepspeed)
    calls = [call for call in count_collectives(run) if call.ranks == run.ranks]
    small = [call for call in calls if call.nbytes < SMALLEST and call.purpose not in (*CONTROL, SCALES)]
    assert [(call.purpose, call.hidden_behind) for call in small] in ([], [(WEIGHTS, Hidden.FORWARD)])
    assert sum(call.purpose in CONTROL for call in calls) <= len(CONTROL)
    passes = 1 if run.zero.zero_hpz_partition_size > 1 else 2
    gathers = sum(call.purpose == WEIGHTS for call in calls)
    assert gathers <= passes * (run.student.layers + 2), "one a layer; the one at which memory is full is in two"
    assert sum(call.purpose == GRADIENTS for call in calls) <= 1 + 1.25 * run.reduced / run.zero.reduce_bucket_size


@pytest.mark.parametrize("name", ["gemma2-27b-to-2b", "gemma2-27b-to-9b", "llama3-70b-to-8b"])
def test_no_collective_of_the_recipes_has_more_ranks_than_a_replica_or_replicas(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = _recipe(name, "zero3", one_copy=False)
    calls = list(count_collectives(run))
    assert max(call.ranks for call in calls) == max(run.shard, run.replicas) <= 128
    across = [call for call in calls if call.spans_world]
    assert [call.purpose for call in across] == ["count of tokens", "numbers of the step", ACROSS]
    assert {call.ranks for call in across} == {run.replicas}
    assert across[-1].nbytes == 4 * run.partition_size, "float32"


@cache
def _inputs(name: str) -> PlanInput:
    teacher = {"gemma2": "gemma-2-27b", "llama3": "llama-3.1-70b"}[name.split("-")[0]]
    folder = RECIPES / "models" / teacher
    return read_plan_input(RECIPES / name / "512-nodes.yaml", sequence_length=8192, teacher_config=folder)


def _recipe(name: str, deepspeed: str, *, one_copy: bool = True) -> Sharding:
    config = load_deepspeed_config(DS_CONFIGS / f"{deepspeed}.json")
    inputs = replace(_inputs(name), deepspeed_config=config)
    if one_copy:
        distributed = inputs.recipe.distributed.model_copy(update={"shard": None})
        inputs = replace(inputs, recipe=inputs.recipe.model_copy(update={"distributed": distributed}))
    return place(inputs.recipe, inputs, Cluster(512, LOCAL_WORLD, accelerator("h100")))
