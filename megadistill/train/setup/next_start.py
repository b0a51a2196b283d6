"""The next start of a run: it takes no step, or it resumes from a checkpoint.

It is read from the run folder alone, so that every rank decides alike, without a model, a process group or an attempt,
and without torch.
"""

from dataclasses import dataclass
from pathlib import Path

from megadistill.config.recipe import Recipe
from megadistill.events import LARGEST_COUNT, ValidationHistory, last_step, read_history, read_validations
from megadistill.io import read_json
from megadistill.redaction import printable
from megadistill.train.checkpoint.folders import checkpoint_folders, has_all_files
from megadistill.train.setup.recipe_changes import recipe_changes
from megadistill.train.setup.schedule_change import how_to_train_longer, tokens_of

OTHER_CONTENT = (
    "data.manifest", "data.sources.", "data.curriculum", "data.skip", "teacher.source", "teacher.targets",
    "run.begin_from",
)  # fmt: skip
"""Keys that say what a run learns from. Some may change on a resume; in a finished run a change has no effect."""

DIVERGED = (
    "But the student diverged (student_diverged in events.jsonl): lower train.optimizer.learning_rate or lengthen "
    "train.schedule.warmup_steps, in another run.folder"
)
"""The end of the line on a finished run whose student diverged."""


@dataclass(frozen=True)
class NothingToDo:
    """A start that would take no step."""

    line: str
    """Why, and what to do instead."""
    recipe_differs: bool
    """Whether the recipe is not exactly the run's, so that `refuse_other_recipe` decides first."""


def nothing_to_do(recipe: Recipe, *, stop_after: int | None) -> NothingToDo | None:
    """Why a start of this recipe would take no step; None: it would take some."""
    folder, steps = Path(recipe.run.folder), recipe.train.steps
    checkpoints = checkpoint_folders(folder / "checkpoints")
    step = max(checkpoints, default=0)
    if recipe.train.tokens is not None and checkpoints:
        steps = step if tokens_of(checkpoints[step]) >= recipe.train.tokens else step + 1
    is_finished = step >= steps and (folder / "DONE").exists()
    is_past_stop = stop_after is not None and step >= stop_after
    is_used_up = not is_finished and (folder / "DONE").exists() and _patience_is_used_up(recipe, step)
    if not (is_finished or is_used_up or is_past_stop) or not has_all_files(checkpoints[step]):
        return None
    differing = _differing_values(folder, recipe)
    ignored = [text for key, text in differing.items() if key.startswith(OTHER_CONTENT)]
    if is_used_up:
        line = (
            f"ended at step {step}, since validation.patience is used up (validation.stop): nothing to do. With a "
            "larger patience, or without stop, the same command resumes"
        )
    elif not is_finished:
        past = f"past --stop-after {stop_after}" if step != stop_after else "where --stop-after stops it"
        line = f"already at step {step}, {past}; rerun without it to continue"
    elif ignored:
        line = (
            f"done, step {step} of {steps}: nothing to do, although {'; '.join(ignored)}. To train on other data or "
            "from another teacher, name another run.folder"
        )
    elif _has_diverged(folder):
        line = f"done, step {step} of {steps}: nothing to do. {DIVERGED}"
    else:
        line = (
            f"done, step {step} of {steps}: nothing to do. `megadistill export {folder} --output DIR` makes a model of "
            f"it; to train longer {how_to_train_longer(folder, recipe)}; to train anew name another run.folder"
        )
    return NothingToDo(line, recipe_differs=bool(differing))


def how_to_resume(folder: Path, command: str | None = None, *, after_fault: bool = False) -> str:
    """A line on a run that has ended: the step that it reached, and what resumes it from which checkpoint.

    `command`: the command that resumes it, if it is known. `after_fault`: a restart alone would meet the same fault.
    """
    step = last_step(folder)
    reached = f"ended after step {step}" if step is not None else "ended before its first step"
    saved = max(checkpoint_folders(folder / "checkpoints"), default=0)
    where = f"resumes from the checkpoint of step {saved}" if saved else "starts from the beginning"
    condition = "once the cause is mended, " if after_fault else ""
    return f"{folder}: {reached}; {condition}{f'`{command}`' if command else 'the same command'} {where}"


def _patience_is_used_up(recipe: Recipe, step: int) -> bool:
    """Whether `validation.stop` has ended the run after `step`, and would again."""
    section = recipe.validation
    if section is None or section.patience is None or not section.stop:
        return False
    history = ValidationHistory.of(read_validations(Path(recipe.run.folder)))
    return history.last_step == step and history.without_gain >= section.patience


def _has_diverged(folder: Path) -> bool:
    """Whether the run has reported that its student diverged, and not gone back to before that."""
    history = read_history(folder, LARGEST_COUNT)
    return history.student_diverged or (history.base is not None and history.base.totals.student_diverged)


def _differing_values(folder: Path, recipe: Recipe) -> dict[str, str]:
    """Key -> both values, of the keys in which the recipe differs from the run's recipe.json, but for its folder."""
    try:
        changes = recipe_changes(read_json(folder / "recipe.json")["recipe"], recipe.snapshot())
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"recipe.json": str(error)}
    return {
        key: printable(f"{key} was {was!r}, is {is_!r}") for key, (was, is_) in changes.items() if key != "run.folder"
    }
