"""A start looks for its checkpoint before it builds a model, and draws no value that a checkpoint or a folder gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.recipe import Recipe
from megadistill.data import Manifest
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.doctor.tiny import write_random
from megadistill.models import initial_weights
from megadistill.models.families import load_config
from megadistill.train import loop
from megadistill.train.hooks.hook import Hook, Request, StepEvent
from megadistill.train.loop import Trainer, run
from megadistill.train.resilience import recovery
from megadistill.train.setup.setup import prepare
from tests.corpora import small_data_set
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks

STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

LOOK, BUILD, DRAW, TORCH = "look for a checkpoint", "build the models", "draw values", "torch draws values"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return small_data_set(folder, sequence_length=64, heldout_fraction=0.3) / "train" / "manifest.json"


class _RollBack(Hook):
    """Asks for a rollback, once."""

    def __init__(self) -> None:
        self.done = False

    def after_step(self, event: StepEvent) -> Request | None:
        done, self.done = self.done, True
        return None if done else Request.ROLL_BACK


def _start(topology: Topology, recipe: Recipe, stop_after: int, rolls_back: bool) -> list[str]:
    """Its actions, in their order; the same one in a row once."""
    actions: list[str] = []

    def watched(action: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            tensors = [each for each in (*arguments, *keywords.values()) if isinstance(each, torch.Tensor)]
            shapes_alone = any(each.is_meta for each in tensors)
            if actions[-1:] != [action] and not shapes_alone:
                actions.append(action)
            return function(*arguments, **keywords)

        return call

    own, hook = Trainer._hooks, _RollBack()
    with pytest.MonkeyPatch.context() as patch:
        for module, name, action in (
            (recovery, "latest_valid", LOOK),
            (loop, "build", BUILD),
            (initial_weights, "keyed_generator", DRAW),
        ):
            patch.setattr(module, name, watched(action, getattr(module, name)))
        for name in ("kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(torch.nn.init, name, watched(TORCH, getattr(torch.nn.init, name)))
        if rolls_back:
            patch.setattr(Trainer, "_hooks", lambda *args, **keys: [*own(*args, **keys), hook])
        launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
        outcome = run(prepare(recipe, launch), topology, stop_after=stop_after)
    assert outcome.step == stop_after
    return actions


def test_only_a_first_start_draws_values(manifest: Path, tmp_path: Path) -> None:
    def recipe(run: str, *, begin_from: Path | None = None, **student: str) -> Recipe:
        values: dict[str, Any] = {
            "objective": "labels",
            "run": {"folder": str(tmp_path / run), "begin_from": None if begin_from is None else str(begin_from)},
            "data": {"manifest": str(manifest)},
            "student": {
                "deepspeed": str(DS_CONFIGS / "zero3.json"),
                "vocab_multiple": 64,
                "config": STUDENT,
                **student,
            },
            "train": {"steps": 9, "global_batch": 4, "micro_batch": 1, "precision": "float32"},
        }
        values["train"]["optimizer"] = {"learning_rate": 1e-3}
        return Recipe.model_validate(values)

    def start(recipe: Recipe, world: int, stop_after: int, *, rolls_back: bool = False) -> list[str]:
        first, *others = run_ranks(world, _start, recipe, stop_after, rolls_back)
        assert others == [first] * len(others)
        return list(first)

    assert start(recipe("one"), 2, 1) == [LOOK, BUILD, DRAW]
    assert start(recipe("one"), 2, 2, rolls_back=True) == [LOOK, BUILD, LOOK]
    assert start(recipe("one"), 1, 3) == [LOOK, BUILD], "on another number of ranks"
    branch = recipe("branch", begin_from=tmp_path / "one")
    assert start(branch, 1, 4) == [LOOK, BUILD], "from a checkpoint of another run"
    config = load_config({**STUDENT, "vocab_size": Manifest.load(manifest).vocab_size}, what="test")
    write_random(config, tmp_path / "weights", seed=0)
    folder = str(tmp_path / "weights")
    assert start(recipe("from weights", weights=folder, config=folder), 2, 1) == [LOOK, BUILD], "from a folder"
