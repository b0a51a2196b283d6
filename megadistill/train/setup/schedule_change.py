"""Changes of a schedule with which a run may resume: those that leave every step it has taken as it was.

Longer training of a constant learning rate is one; a cosine depends on `train.steps` from its first step on.
"""

from collections.abc import Mapping
from pathlib import Path

from megadistill.config.recipe import Recipe
from megadistill.errors import UserError
from megadistill.io import read_json
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.schedule import divergence_share, learning_rate

SCHEDULE_KEYS = ("train.steps", "train.tokens", "train.schedule.", "loss.schedule")
"""Beginnings of the keys that may change with `refuse_changed_steps`."""


def first_changed_step(before: Recipe, now: Recipe, taken: int) -> int | None:
    """The first of the steps 1 to `taken` whose learning rate or divergence weight differs in a bit, None if none.

    Of runs with `train.steps`.
    """
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
    if before.train.tokens is not None or now.train.tokens is not None:
        _refuse_changed_tokens(folder, before, now, taken, changes=changes)
        return
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
    if recipe.train.tokens is not None:
        newest = checkpoints[max(checkpoints)]
        more = {"tokens": 2 * recipe.train.tokens}
        longer = recipe.model_copy(update={"train": recipe.train.model_copy(update=more)})
        if unchanged_in_tokens(recipe, longer, tokens_of(newest)):
            return "raise train.tokens"
        return f"begin a new run with --set run.begin_from={newest} --set run.folder=NEW --set train.tokens=N"
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2 * recipe.train.steps})})
    first = first_changed_step(recipe, longer, max(checkpoints))
    if first is None:
        return "raise train.steps"
    start = checkpoints[_start_before(first, checkpoints)]
    return f"begin a new run with --set run.begin_from={start} --set run.folder=NEW --set train.steps=N"


def unchanged_in_tokens(before: Recipe, now: Recipe, taken: int) -> bool:
    """Whether the schedules of two runs with `train.tokens` are the same over the first `taken` tokens."""
    if before.train.tokens is None or now.train.tokens is None:
        return taken == 0
    same_length = before.train.tokens == now.train.tokens
    for old, new in ((before.train.schedule, now.train.schedule), (before.loss.schedule, now.loss.schedule)):
        if old is None or new is None:
            if old is not new:
                return taken == 0
            continue
        if old == new and same_length:
            continue
        stable = min(
            run.train.tokens - schedule.decay if run.train.tokens and schedule.decay else 0
            for run, schedule in ((before, old), (now, new))
        )
        if taken > stable or old.kind != new.kind or old.warmup != new.warmup:
            return taken == 0
    return True


def tokens_of(checkpoint: Path) -> int:
    """Tokens that a run had read at a checkpoint."""
    try:
        return int(read_json(checkpoint / "manifest.json")["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # a damaged one: the search for a valid checkpoint says so


def _refuse_changed_tokens(folder: Path, before: Recipe, now: Recipe, step: int, *, changes: str) -> None:
    checkpoints = checkpoint_folders(folder / "checkpoints")
    taken = tokens_of(checkpoints[step]) if checkpoints else 0
    if unchanged_in_tokens(before, now, taken) and (now.train.tokens is None or taken <= now.train.tokens):
        return
    raise UserError(
        f"{folder} has read {taken:,} tokens in {step} steps, and {changes} would have given some of them another "
        "learning rate or weight of the divergence, or ends the run before: undo the change, or begin a new run from "
        "a checkpoint before the difference (run.begin_from), or name another run.folder, which trains anew"
    )


def _start_before(first: int, checkpoints: Mapping[int, Path]) -> int:
    """The newest checkpoint before step `first`; the newest of all where none is that old."""
    return max((step for step in checkpoints if step < first), default=max(checkpoints))


def _share(recipe: Recipe, step: int) -> float:
    return divergence_share(recipe.loss, step, length=recipe.train.steps)


def _difference(before: Recipe, now: Recipe, step: int) -> str:
    old, new = learning_rate(before.train, step), learning_rate(now.train, step)
    if old != new:
        return f"step {step} the learning rate {new:.6g} instead of {old:.6g}"
    return f"step {step} {_share(now, step):.6g} of loss.kd_weight instead of {_share(before, step):.6g}"
