"""Changes of a schedule with which a run may resume: those that leave every step it has taken as it was.

Longer training of a constant learning rate is one; a cosine depends on `train.steps` from its first step on.
"""

from collections.abc import Mapping
from pathlib import Path

from megadistill.config.recipe import Recipe
from megadistill.errors import UserError
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.schedule import divergence_share, learning_rate

SCHEDULE_KEYS = ("train.steps", "train.schedule.", "loss.schedule")
"""Beginnings of the keys that may change with `refuse_changed_steps`."""


def first_changed_step(before: Recipe, now: Recipe, taken: int) -> int | None:
    """The first of the steps 1 to `taken` whose learning rate or divergence weight differs in a bit, None if none."""
    for step in range(1, taken + 1):
        if learning_rate(before.train, step) != learning_rate(now.train, step):
            return step
        if _share(before, step) != _share(now, step):
            return step
    return None


def refuse_changed_steps(folder: Path, before: Recipe, now: Recipe, *, changes: str) -> None:
    """Refuses a schedule under which steps that a run has taken would have been other ones.

    `changes`: what differs between the recipes, for the message. Taken are the steps up to the newest checkpoint.

    Raises:
        UserError: names the first such step, and the checkpoint from which a new run may begin.
    """
    checkpoints = checkpoint_folders(folder / "checkpoints")
    taken = max(checkpoints, default=0)
    first = first_changed_step(before, now, min(taken, now.train.steps))
    if first is not None:
        why = f"{changes} would have given {_difference(before, now, first)}"
    elif taken > now.train.steps:
        first, why = now.train.steps + 1, f"{changes} ends the run before"
    else:
        return
    start = _start_before(first, checkpoints)
    if start < first:
        hint, origin = f"the last checkpoint before that is of step {start}", "it"
    else:
        hint, origin = "no checkpoint is older", "the newest"
        if before.train.schedule.kind == "cosine":
            hint += " (a cosine depends on train.steps from its first step on; train.schedule.kind wsd does not)"
    way = "name another run.folder, which trains anew"
    if start < now.train.steps:
        way = f"begin a new run from {origin} with --set run.begin_from={checkpoints[start]} --set run.folder=NEW"
    raise UserError(f"{folder} has taken {taken} steps, and {why}; {hint}: undo the change, or {way}")


def how_to_train_longer(folder: Path, recipe: Recipe) -> str:
    """The way to more steps than a finished run has: in place, where no step would change, or from a checkpoint."""
    checkpoints = checkpoint_folders(folder / "checkpoints")
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2 * recipe.train.steps})})
    first = first_changed_step(recipe, longer, max(checkpoints))
    if first is None:
        return "raise train.steps"
    start = checkpoints[_start_before(first, checkpoints)]
    return f"begin a new run with --set run.begin_from={start} --set run.folder=NEW --set train.steps=N"


def _start_before(first: int, checkpoints: Mapping[int, Path]) -> int:
    """The newest checkpoint before step `first`; the newest of all where none is that old."""
    return max((step for step in checkpoints if step < first), default=max(checkpoints))


def _share(recipe: Recipe, step: int) -> float:
    return divergence_share(recipe.loss, step, steps=recipe.train.steps)


def _difference(before: Recipe, now: Recipe, step: int) -> str:
    old, new = learning_rate(before.train, step), learning_rate(now.train, step)
    if old != new:
        return f"step {step} the learning rate {new:.6g} instead of {old:.6g}"
    return f"step {step} {_share(now, step):.6g} of loss.kd_weight instead of {_share(before, step):.6g}"
