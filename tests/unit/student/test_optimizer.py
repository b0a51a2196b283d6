"""An optimizer's recipe keys, groups, state and plan, for AdamW and for a kind that a test adds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.keys import keys
from megadistill.config.load import load_recipe, validate_recipe
from megadistill.config.recipe import AdamWSection, OptimizerSection, Recipe
from megadistill.errors import UserError
from megadistill.plan.counts.requirements import count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.zero import Zero
from megadistill.student.optimizer import OPTIMIZERS, build_optimizer, describe, state_bytes, state_kinds
from tests.paths import ROOT
from tests.toy_optimizer import MomentumSection, toy_optimizer
from tests.unit.plan.cases import stats

RECIPE: dict[str, Any] = {
    "objective": "labels",
    "run": {"folder": "runs/x"},
    "data": {"manifest": "manifest.json"},
    "student": {"config": {"model_type": "llama"}},
    "train": {"steps": 10, "global_batch": 8, "micro_batch": 2},
}


@pytest.fixture
def toy() -> Iterator[None]:
    with toy_optimizer():
        yield


def _recipe(**optimizer: Any) -> Recipe:
    train = {**RECIPE["train"], "optimizer": {"learning_rate": 1e-3, **optimizer}}
    return validate_recipe({**RECIPE, "train": train}, source="recipe")


def test_adamw_is_the_default() -> None:
    section = _recipe().train.optimizer
    assert section == AdamWSection(learning_rate=1e-3) == _recipe(kind="adamw").train.optimizer
    assert state_kinds(section) == ("master", "exp_avg", "exp_avg_sq")
    assert (state_bytes(section), OPTIMIZERS[section.kind].gradient_mean) == (12, "exp_avg")
    assert describe(section) == "AdamW, β₁ 0.9, β₂ 0.95, ε 1e-08, weight decay 0.1 on matrices"


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"beta3": 0.5}, "train.optimizer.beta3: no such key; did you mean 'beta2'?"),
        ({"beta1": 1.5}, "train.optimizer.beta1: give less than 1.0, found 1.5"),
        ({"kind": "momentum"}, "train.optimizer.kind: input should be 'adamw', found 'momentum'"),
    ],
)
def test_errors_name_the_key_without_the_kind(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        _recipe(**optimizer)
    assert message in str(caught.value)


def test_matrices_decay_and_vectors_do_not() -> None:
    """Biases of experts and the norms of Cohere's heads are no matrices, though they have two dimensions."""
    shapes = {
        "model.layers.0.mlp.experts.down_proj": (8, 4, 2),
        "model.layers.0.mlp.experts.down_proj_bias": (8, 4),
        "model.layers.0.self_attn.q_norm.weight": (4, 2),
        "model.layers.0.self_attn.sinks": (8,),
        "model.embed_tokens.weight": (2, 2),
        "model.norm.weight": (3,),
    }
    partitions: dict[str, Any] = {name: torch.nn.Parameter(torch.zeros(4)) for name in shapes}
    for name, shape in shapes.items():
        partitions[name].ds_shape = shape
    optimizer = build_optimizer(AdamWSection(learning_rate=1.0, weight_decay=0.3), partitions.items())
    assert isinstance(optimizer, torch.optim.AdamW)
    matrices, vectors = optimizer.param_groups
    assert ([p.ds_shape for p in matrices["params"]], matrices["weight_decay"]) == ([(8, 4, 2), (2, 2)], 0.3)
    assert ([p.ds_shape for p in vectors["params"]], vectors["weight_decay"]) == ([(8, 4), (4, 2), (8,), (3,)], 0.0)
    assert matrices["lr"] == 0.0, "each step sets it"


@pytest.mark.usefixtures("toy")
def test_a_new_kind_is_read_listed_and_refused_like_the_others(tmp_path: Path) -> None:
    section: OptimizerSection = _recipe(kind="momentum", momentum=0.8).train.optimizer
    assert section == MomentumSection(learning_rate=1e-3, momentum=0.8)
    assert describe(section) == "SGD, momentum 0.8, weight decay 0.1 on matrices"
    assert validate_recipe(_recipe(kind="momentum").snapshot(), source="recipe.json") == _recipe(kind="momentum")
    known = {key.name: key for key in keys()}
    assert known["train.optimizer.kind"].type == "`adamw` or `momentum`"
    assert known["train.optimizer.momentum"].default == "0.9"
    assert known["train.optimizer.beta1"].default == "0.9"
    with pytest.raises(UserError, match=r"train.optimizer.beta1: no such key"):
        _recipe(kind="momentum", beta1=0.5)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(_recipe().snapshot()), encoding="utf-8")
    assert load_recipe(path, ["train.optimizer.beta2=0.9"]).train.optimizer == AdamWSection(
        learning_rate=1e-3, beta2=0.9
    )


@pytest.mark.usefixtures("toy")
def test_a_new_kind_is_planned() -> None:
    layout: dict[str, Any] = {"vocab_size": 250, "ranks": 2, "ranks_per_node": 2, "group_size": 1, "zero": Zero.of({})}
    runs = [Sharding(_recipe(kind=kind), stats(), **layout) for kind in ("adamw", "momentum")]
    size = runs[0].partition_size
    adamw, momentum = (count_requirements(run) for run in runs)
    states = [required.phases["step"]["ZeRO-3 states"] for required in (adamw, momentum)]
    assert states == [18 * size, 14 * size], "bfloat16 weights, gradient, master weights and one or two states"
    saved = adamw.checkpoint_bytes - momentum.checkpoint_bytes
    assert saved > 4 * sum(runs[0].param_sizes), "a state less, and its entries in the headers"


def test_other_modules_do_not_name_an_optimizer_or_its_state() -> None:
    """They ask `student.optimizer`. `config.load` has the former name of a key."""
    naming = {
        path.relative_to(ROOT / "megadistill").as_posix()
        for path in (ROOT / "megadistill").rglob("*.py")
        if re.search("adamw|exp_avg", path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert naming == {"config/load.py", "config/recipe.py", "student/optimizer.py"}
