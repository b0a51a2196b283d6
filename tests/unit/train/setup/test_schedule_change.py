"""A run resumes with another schedule where every step that it has taken stays as it was, and only there."""

from pathlib import Path
from typing import Any

import pytest

from megadistill.config.recipe import Recipe
from megadistill.errors import UserError
from megadistill.train.setup.run_folder import refuse_other_recipe, write_description
from megadistill.train.setup.schedule_change import how_to_train_longer, unchanged_in_tokens
from tests.unit.train.cases import recipe

WSD: dict[str, Any] = {"kind": "wsd", "warmup_steps": 10, "decay_steps": 100}
COSINE: dict[str, Any] = {"kind": "cosine", "warmup_steps": 10}


def _recipe(steps: int, schedule: dict[str, Any], loss: dict[str, Any] | None = None) -> Recipe:
    train = {"steps": steps, "schedule": schedule}
    if loss is None:
        return recipe(Path("m.json"), Path("run"), train=train)
    return recipe(Path("m.json"), Path("run"), teacher=Path("teacher"), train=train, loss={"schedule": loss})


def _run(folder: Path, before: Recipe, *saved: int) -> Path:
    write_description(folder, before.snapshot(), {})
    for step in saved:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (_recipe(400, WSD), _recipe(800, WSD)),
        (_recipe(400, WSD), _recipe(300, {**WSD, "decay_steps": 50})),
        (_recipe(400, WSD), _recipe(800, {**WSD, "final_ratio": 0.0})),
        (_recipe(400, WSD), _recipe(400, {**WSD, "kind": "wsd", "decay_steps": 150})),
        (_recipe(400, {**COSINE, "final_ratio": 1.0}), _recipe(800, {**COSINE, "final_ratio": 1.0})),
        (_recipe(400, WSD, loss=WSD), _recipe(800, WSD, loss=WSD)),
        (_recipe(400, {**COSINE, "final_ratio": 1.0}), _recipe(400, WSD)),
    ],
)
def test_a_change_that_leaves_the_taken_steps_alone_may_be_resumed_with(
    tmp_path: Path, before: Recipe, now: Recipe
) -> None:
    refuse_other_recipe(_run(tmp_path / "run", before, 100, 250), now.snapshot())


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (
            _recipe(400, WSD),
            _recipe(800, WSD),
            "has taken 400 steps, and train.steps 400 -> 800 would have given step 301 the learning rate 0.001 instead "
            "of 0.000991; the last checkpoint before that is of step 300: undo the change, or begin a new run from it "
            "with --set run.begin_from=RUN/checkpoints/step-00000300 --set run.folder=NEW",
        ),
        (
            _recipe(400, COSINE),
            _recipe(800, COSINE),
            "would have given step 11 the learning rate 0.000999996 instead of 0.000999985; no checkpoint is older (a "
            "cosine depends on train.steps from its first step on; train.schedule.kind wsd does not)",
        ),
        (_recipe(400, COSINE), _recipe(800, COSINE), "--set run.begin_from=RUN/checkpoints/step-00000400 --set"),
        (_recipe(400, WSD), _recipe(400, {**WSD, "warmup_steps": 20}), "would have given step 1 the learning rate"),
        (_recipe(400, WSD), _recipe(350, WSD), "would have given step 251 the learning rate"),
        (
            _recipe(500, {**COSINE, "final_ratio": 1.0}),
            _recipe(350, {**COSINE, "final_ratio": 1.0}),
            "train.steps 500 -> 350 ends the run before; the last checkpoint before that is of step 300",
        ),
        (_recipe(400, WSD, loss=WSD), _recipe(400, WSD, loss={**WSD, "decay_steps": 120}), "of loss.kd_weight instead"),
    ],
)
def test_a_change_of_a_taken_step_is_refused_with_the_checkpoint_before_it(
    tmp_path: Path, before: Recipe, now: Recipe, says: str
) -> None:
    run = _run(tmp_path / "run", before, 100, 250, 300, 400)
    with pytest.raises(UserError) as caught:
        refuse_other_recipe(run, now.snapshot())
    message = str(caught.value).replace(str(run), "RUN")
    assert "\n" not in message
    assert says in message


@pytest.mark.parametrize("schedule", [COSINE, {**COSINE, "final_ratio": 1.0}])
def test_fewer_steps_than_the_oldest_checkpoint_has_need_another_folder(
    tmp_path: Path, schedule: dict[str, Any]
) -> None:
    """A branch takes at least one step more than its checkpoint."""
    run = _run(tmp_path / "run", _recipe(400, schedule), 200, 300, 400)
    with pytest.raises(UserError, match=r"undo the change, or name another run\.folder, which trains anew$"):
        refuse_other_recipe(run, _recipe(200, schedule).snapshot())


def test_a_run_that_has_saved_nothing_may_have_any_schedule(tmp_path: Path) -> None:
    refuse_other_recipe(_run(tmp_path / "run", _recipe(400, COSINE)), _recipe(800, WSD).snapshot())


def test_another_peak_is_another_recipe(tmp_path: Path) -> None:
    now = recipe(Path("m.json"), Path("run"), train={"optimizer": {"learning_rate": 2e-3}, "steps": 8})
    with pytest.raises(UserError, match=r"train\.optimizer\.learning_rate was 0\.001, is 0\.002"):
        refuse_other_recipe(_run(tmp_path / "run", recipe(Path("m.json"), Path("run"))), now.snapshot())


@pytest.mark.parametrize(
    ("schedule", "way"),
    [
        (WSD, "begin a new run with --set run.begin_from=RUN/checkpoints/step-00000250 --set run.folder=NEW"),
        (COSINE, "begin a new run with --set run.begin_from=RUN/checkpoints/step-00000400 --set run.folder=NEW"),
        ({**COSINE, "final_ratio": 1.0}, "raise train.steps"),
    ],
)
def test_a_finished_run_says_how_to_train_longer(tmp_path: Path, schedule: dict[str, Any], way: str) -> None:
    run = _run(tmp_path / "run", _recipe(400, schedule), 250, 350, 400)
    assert how_to_train_longer(run, _recipe(400, schedule)).replace(str(run), "RUN").startswith(way)


def _in_tokens(tokens: int, *, kind: str = "wsd", warmup: int = 100, decay: int | None = 200) -> Recipe:
    schedule = {"kind": kind, "warmup_tokens": warmup, "decay_tokens": decay, "warmup_steps": None}
    train = {"tokens": tokens, "steps": None, "schedule": {**schedule, "decay_steps": None}}
    return recipe(Path("manifest.json"), Path("run"), train=train)


@pytest.mark.parametrize(
    ("now", "taken", "unchanged"),
    [
        (_in_tokens(2000), 800, True),
        (_in_tokens(2000), 801, False),  # of a run of 1000 tokens, which decays from 800 on
        (_in_tokens(1000), 1000, True),
        (_in_tokens(2000, warmup=50), 300, False),
        (_in_tokens(2000, decay=1300), 700, True),
        (_in_tokens(2000, decay=1300), 701, False),
        (_in_tokens(1000, kind="cosine", decay=None), 1, False),
        (_in_tokens(1000, kind="cosine", decay=None), 0, True),
    ],
)
def test_a_schedule_in_tokens_may_change_ahead(now: Recipe, taken: int, *, unchanged: bool) -> None:
    assert unchanged_in_tokens(_in_tokens(1000), now, taken) == unchanged
