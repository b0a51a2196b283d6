"""Settings that would run and are probably a mistake: each one is named with the way out, and sound ones are not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config import auto as choices
from megadistill.config.load import load_recipe
from megadistill.config.recipe import LossSection
from megadistill.data import Mixture
from megadistill.data.stream.order import CurriculumEntry
from megadistill.distributed.launch import Launch
from megadistill.train.setup.plausibility import implausible_settings
from megadistill.train.setup.setup import Setup, prepare
from tests.paths import RECIPES
from tests.unit.train.cases import SEQUENCE, described_data, recipe

SEQUENCES = 8
"""Size of the data that is only described."""


def _setup(folder: Path, **train: Any) -> Setup:
    """A run that reads the data once, with one sequence a step."""
    values = {"steps": SEQUENCES, "global_batch": 1, "micro_batch": 1, **train}
    return prepare(recipe(described_data(folder / "data"), folder / "run", train=values), Launch(0, 1, 0, 1))


def test_a_sound_recipe_has_nothing_to_say(tmp_path: Path) -> None:
    assert implausible_settings(_setup(tmp_path)) == {}


def test_many_ranks_reduce_their_gradients_in_float32(tmp_path: Path) -> None:
    setup = _setup(tmp_path, global_batch=65, precision="bfloat16")
    assert "gradient reduction" not in implausible_settings(setup)
    narrow = dataclasses.replace(setup, deepspeed_config={"zero_optimization": {"stage": 3}})
    assert "gradient reduction" not in implausible_settings(narrow), "one rank accumulates 65 micro-batches"
    warning = implausible_settings(dataclasses.replace(narrow, ranks=65))["gradient reduction"]
    assert warning.startswith("gradients of 65 ranks are added up in bfloat16")


def test_rows_that_are_computed_for_nothing_are_counted_with_the_batches_that_have_none(tmp_path: Path) -> None:
    def warning(world: int, **sections: Any) -> str | None:
        made = recipe(described_data(tmp_path / "data"), tmp_path / "run", **sections)
        setup = prepare(made, Launch(0, world, 0, world))
        return implausible_settings(setup).get("surplus rows")

    for world in (1, 2, 4):
        assert warning(world) is None
    line = warning(3)
    assert line is not None
    assert line.startswith("the global batch of 8 sequences does not divide into 3 ranks x micro-batch 2, and 33.3% of")
    assert line.endswith("the nearest global batches without any: 6 or 12")
    line = warning(5)
    assert line is not None
    assert line.endswith(
        "and 20.0% of the rows that are computed are surplus, which count for nothing; the nearest "
        "global batches without any: 10"
    )
    shared = warning(6, distributed={"sequence": 2, "vocab_group": 1})
    assert shared is not None
    assert "3 groups of 2 ranks x micro-batch 2, and 33.3%" in shared


def test_eager_kernels_on_an_accelerator_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the recipe asks for them, and where `auto` finds no Triton."""
    auto = _setup(tmp_path)
    update = {"loss": LossSection(elementwise="eager")}
    eager = dataclasses.replace(auto, recipe=auto.recipe.model_copy(update=update))
    monkeypatch.setattr(choices, "has_triton", lambda: True)
    assert "eager kernels" not in implausible_settings(eager), "on a CPU it is the default"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert "eager kernels" not in implausible_settings(auto)
    warning = implausible_settings(eager)["eager kernels"]
    assert warning.startswith("eager on cuda: loss.elementwise (by the recipe); the loss reads and writes its logits")
    assert warning.endswith("set loss.elementwise to auto")
    monkeypatch.setattr(choices, "has_triton", lambda: False)
    warning = implausible_settings(auto)["eager kernels"]
    assert "student.compile and loss.elementwise (no package triton is installed)" in warning
    assert "a kernel and the loss reads" in warning


def test_random_weights_need_a_warm_up(tmp_path: Path) -> None:
    setup = _setup(tmp_path, steps=400, global_batch=1, schedule={"warmup_steps": 0})
    warning = implausible_settings(setup)["warm-up"]
    assert "train.schedule.warmup_steps is 0" in warning
    assert "warmup_steps=20" in warning
    assert "warm-up" not in implausible_settings(_setup(tmp_path, steps=400, schedule={"warmup_steps": 1}))
    assert "warm-up" not in implausible_settings(_setup(tmp_path, steps=400))
    assert "warm-up" not in implausible_settings(_setup(tmp_path, schedule={"warmup_steps": 0})), "8 steps have none"


def test_weights_of_a_trained_model_may_do_without_a_warm_up(tmp_path: Path) -> None:
    setup = _setup(tmp_path, steps=400, schedule={"warmup_steps": 0})
    student = setup.recipe.student.model_copy(update={"weights": "pruned"})
    pruned = dataclasses.replace(setup, recipe=setup.recipe.model_copy(update={"student": student}))
    assert "warm-up" not in implausible_settings(pruned)


@pytest.mark.parametrize(("steps", "warned"), [(4 * SEQUENCES, False), (4 * SEQUENCES + 1, True)])
def test_more_than_four_epochs_are_named(steps: int, warned: bool, tmp_path: Path) -> None:
    warnings = implausible_settings(_setup(tmp_path, steps=steps))
    assert ("epochs" in warnings) is warned


@pytest.mark.parametrize(("steps", "epochs"), [(130, "130"), (1300, "1,300")])
def test_the_epochs_of_a_run_are_counted(steps: int, epochs: str, tmp_path: Path) -> None:
    warning = implausible_settings(_setup(tmp_path, steps=steps, global_batch=SEQUENCES))["epochs"]
    assert f"{epochs} epochs of {SEQUENCES * SEQUENCE:,} tokens" in warning
    assert "train.steps=1 " in warning
    assert "2305.16264" in warning


def test_each_source_of_a_mixture_has_its_own_epochs(tmp_path: Path) -> None:
    setup = _setup(tmp_path, steps=50)
    (manifest,) = setup.data.sources.values()
    curriculum = (CurriculumEntry(10, {"web": 1}), CurriculumEntry(None, {"web": 1, "code": 9}))
    mixture = Mixture({"web": manifest, "code": manifest}, curriculum)
    warning = implausible_settings(dataclasses.replace(setup, data=mixture))["epochs"]
    assert "4.5 epochs of code" in warning
    assert "of web" not in warning, "10 and 4 of its 8 sequences are fewer than four epochs"


def test_a_learning_rate_that_overwrites_the_initial_weights_is_named(tmp_path: Path) -> None:
    warning = implausible_settings(_setup(tmp_path, optimizer={"learning_rate": 10.0}))["learning rate"]
    assert "train.optimizer.learning_rate is 10" in warning
    assert "0.02" in warning
    assert "learning rate" not in implausible_settings(_setup(tmp_path, optimizer={"learning_rate": 0.02}))


@pytest.mark.parametrize(
    "path", [path for path in RECIPES.rglob("*.yaml") if "base" not in path.stem], ids=lambda path: path.stem
)
def test_the_shipped_recipes_have_plausible_numbers(path: Path, tmp_path: Path) -> None:
    """The data is another, so its epochs are not theirs."""
    shipped = load_recipe(path, ["run.folder=runs/x"])
    setup = _setup(tmp_path)
    keys = {"train": shipped.train, "student": shipped.student}
    whole = dataclasses.replace(setup, recipe=setup.recipe.model_copy(update=keys))
    assert implausible_settings(whole).keys() <= {"epochs"}
