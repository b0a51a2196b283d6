"""Defaults that follow from other keys: the warm-up, and which checkpoints stay."""

import json
from pathlib import Path

import pytest

from megadistill.config.load import load_recipe, validate_recipe
from megadistill.train.setup.schedule_change import first_changed_step
from tests.unit.config.test_recipe import MINIMAL, write

WSD = ["train.schedule.kind=wsd", "train.schedule.decay_steps=1000"]


@pytest.mark.parametrize(
    ("overrides", "warmup_steps"),
    [
        (["train.steps=10"], 0),
        (["train.steps=400"], 20),
        (["train.steps=400", "train.schedule.warmup_steps=null"], 20),
        (["train.steps=400", "train.schedule.warmup_steps=0"], 0),
        (["train.steps=1000000"], 2000),
        (["train.steps=1040", *WSD], 40),
    ],
)
def test_the_learning_rate_warms_up_over_a_twentieth_of_the_run(
    tmp_path: Path, overrides: list[str], warmup_steps: int
) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert recipe.snapshot()["train"]["schedule"]["warmup_steps"] == warmup_steps


def test_the_weight_of_the_divergence_does_not_warm_up(tmp_path: Path) -> None:
    text = MINIMAL.replace("objective: labels", "objective: distill\nteacher: {path: t}")
    recipe = load_recipe(write(tmp_path, text), ["train.steps=400", "loss.schedule.kind=cosine"])
    assert recipe.snapshot()["loss"]["schedule"]["warmup_steps"] == 0


def test_a_longer_run_keeps_the_warm_up_with_which_it_began(tmp_path: Path) -> None:
    """The default of 800 steps is 40: it would change the rates of steps that were taken."""
    path, folder = write(tmp_path, MINIMAL), tmp_path / "run"
    at = [f"run.folder={folder}"]
    folder.mkdir()
    first = load_recipe(path, [*at, "train.steps=400"])
    (folder / "recipe.json").write_text(json.dumps({"recipe": first.snapshot()}), encoding="utf-8")
    assert load_recipe(path, [*at, "train.steps=800"]).train.schedule.warmup_steps == 20
    longer = [*at, "train.steps=800", "train.schedule.warmup_steps=30"]
    assert load_recipe(path, longer).train.schedule.warmup_steps == 30, "a given one is not overridden"
    assert load_recipe(path, ["train.steps=800"]).train.schedule.warmup_steps == 40, "another folder has its own"


def test_so_does_a_longer_run_by_tokens(tmp_path: Path) -> None:
    path, folder = write(tmp_path, MINIMAL), tmp_path / "run"
    at = [f"run.folder={folder}", "train.steps=null"]
    folder.mkdir()
    first = load_recipe(path, [*at, "train.tokens=4000"])
    (folder / "recipe.json").write_text(json.dumps({"recipe": first.snapshot()}), encoding="utf-8")
    assert load_recipe(path, [*at, "train.tokens=8000"]).train.schedule.warmup_tokens == 200


@pytest.mark.parametrize("damaged", ["", "[]", '{"recipe": {"train": 3}}', '{"recipe": {}}'])
def test_a_damaged_run_folder_does_not_hide_the_default(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "recipe.json").write_text(damaged, encoding="utf-8")
    recipe = load_recipe(write(tmp_path, MINIMAL), [f"run.folder={tmp_path}", "train.steps=400"])
    assert recipe.train.schedule.warmup_steps == 20


@pytest.mark.parametrize(
    ("overrides", "keep_every"),
    [
        ([], 10_000),
        (["train.checkpoint_every=20"], 200),
        (["train.checkpoint_every=20", "checkpoint.keep_every=0"], 0),
        (["checkpoint.keep_every=null", "checkpoint.keep_last=1"], 10_000),
    ],
)
def test_one_checkpoint_in_ten_stays(tmp_path: Path, overrides: list[str], keep_every: int) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert recipe.snapshot()["checkpoint"]["keep_every"] == keep_every


def test_a_recipe_of_a_run_folder_stays_as_it_was_written(tmp_path: Path) -> None:
    written = load_recipe(write(tmp_path, MINIMAL), ["train.steps=400"]).snapshot()
    written["train"]["steps"] = 800
    assert validate_recipe(written, source="recipe.json").train.schedule.warmup_steps == 20


@pytest.mark.parametrize(
    ("overrides", "stable_steps"),
    [
        (["train.steps=4000"], 0),
        (["train.steps=4000", *WSD], 3000),
        (["train.steps=1000", *WSD], 0),
        (["train.steps=4000", *WSD, "loss.schedule.kind=wsd", "loss.schedule.decay_steps=1500"], 2500),
        (["train.steps=4000", *WSD, "loss.schedule.kind=cosine"], 0),
    ],
)
def test_the_steps_that_do_not_depend_on_the_length_of_the_run(
    tmp_path: Path, overrides: list[str], stable_steps: int
) -> None:
    text = MINIMAL.replace("objective: labels", "objective: distill\nteacher: {path: t}")
    recipe = load_recipe(write(tmp_path, text), overrides)
    assert recipe.stable_steps == stable_steps
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2 * recipe.train.steps})})
    first = first_changed_step(recipe, longer, recipe.train.steps)
    assert first is not None
    assert (first == stable_steps + 1) if stable_steps else first <= recipe.train.steps
