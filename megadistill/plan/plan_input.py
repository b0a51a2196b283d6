"""Inputs of a plan: a recipe, its models' configs and its data's sizes, also where data and weights are elsewhere."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadistill.config.load import load_recipe
from megadistill.config.paths import not_model
from megadistill.config.recipe import Recipe
from megadistill.data import Mixture
from megadistill.errors import UserError
from megadistill.models.families import load_config, refuse_as_student, refuse_documents
from megadistill.models.hf_folder import has_all_files
from megadistill.models.weights import check_weights
from megadistill.plan.counts.model_stats import RecipeStats, measure_models, measure_several
from megadistill.plan.entries import (
    EntryRecipe,
    entry_recipes,
    in_steps,
    main_entry,
    source_lengths,
    teacher_shares,
)
from megadistill.redaction import printable
from megadistill.student.deepspeed_config import deepspeed_path, load_deepspeed_config


@dataclass(frozen=True)
class PlanInput:
    """A recipe with everything that its costs are counted from."""

    recipe: Recipe
    stats: RecipeStats
    """Its models, the student's with the data's vocabulary."""
    vocab_size: int
    deepspeed_config: dict[str, Any]
    """DeepSpeed's settings."""
    without_data: bool
    """Whether the shards are elsewhere, and vocabulary and sequence length those of the student and the option."""
    entry: EntryRecipe | None = None
    """The steps that `recipe` has, where the curriculum's entries differ in shape; None: all of the run's."""
    others: tuple["PlanInput", ...] = ()
    """Inputs of the other entries, beside the main one."""


def read_plan_input(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    sequence_length: int | None = None,
    teacher_config: Path | None = None,
) -> PlanInput:
    """`sequence_length` replaces data, and `teacher_config` a teacher's folder, that are not on this machine.

    Raises:
        UserError: one line; where an option helps, it is named.
    """
    recipe = load_recipe(path, overrides)
    source = recipe.student.config
    student = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    refuse_as_student(student, "student.config")
    data = _data(recipe, sequence_length)
    teachers = _teachers(recipe, teacher_config)
    models = {"student.config": student, **{f"{key}.path": config for key, config in teachers.items()}}
    if recipe.data.document_mask:
        longest = sequence_length if data is None else data.sequence_length
        for what, config in models.items():
            refuse_documents(config, what, sequence_length=longest)
    if data is None:
        assert sequence_length is not None
        if isinstance(source, dict) and "vocab_size" not in source:
            raise UserError(
                "student.config has no vocab_size, and the data that would decide it is not here: plan with --set "
                "student.config.vocab_size=V"
            )
        vocab_size, length = int(student.vocab_size), sequence_length
    else:
        named = isinstance(source, str) or "vocab_size" in source
        rows = [student.vocab_size] if named else []
        sections = recipe.teacher_sections
        rows += [each.vocab_size for key, each in teachers.items() if sections[key].vocab_map is None]
        vocab_size, length = data.for_models(*rows).vocab_size, data.sequence_length
        student.vocab_size = vocab_size
    for name, config in models.items():
        if length > config.max_position_embeddings:
            raise UserError(f"{name}: max_position_embeddings is {config.max_position_embeddings}, below {length}")
    whole = PlanInput(
        recipe=recipe,
        stats=_stats(recipe, student, teachers, sequence_length=length, first_step=_first_step(recipe)),
        vocab_size=vocab_size,
        deepspeed_config=load_deepspeed_config(deepspeed_path(recipe.student.deepspeed, on_gpus=True)),
        without_data=data is None,
    )
    if recipe.data.curriculum:
        lengths = source_lengths(recipe, data, sequence_length)
        entries = entry_recipes(recipe, lengths)
        if len(entries) > 1 or recipe.has_shaped_entries or recipe.train.tokens is not None:
            return _of_entries(whole, entries, student, teachers)
    elif recipe.train.tokens is not None:
        return replace(whole, recipe=in_steps(recipe, tokens_per_step=recipe.train.global_batch * length))
    return whole


def _of_entries(
    whole: PlanInput, entries: Sequence[EntryRecipe], student: Any, teachers: Mapping[str, Any]
) -> PlanInput:
    """The inputs of the entry with the most tokens, and with it those of the others. Counted from step 0."""
    inputs = {
        each.entry: replace(
            whole,
            recipe=each.recipe,
            stats=_stats(each.recipe, student, teachers, sequence_length=each.sequence_length),
            entry=each,
        )
        for each in entries
    }
    main = inputs.pop(main_entry(entries).entry)
    return replace(main, others=tuple(inputs.values()))


def _stats(
    recipe: Recipe, student: Any, teachers: Mapping[str, Any], *, sequence_length: int, first_step: int = 0
) -> RecipeStats:
    how = {"sequence_length": sequence_length, "first_step": first_step}
    if not recipe.teachers:
        return measure_models(student, teachers.get("teacher"), **how)
    tokens = recipe.train.tokens or recipe.train.steps * recipe.train.global_batch * sequence_length
    shares = teacher_shares(recipe, tokens=tokens)
    return measure_several(student, {name: (teachers.get(f"teachers.{name}"), shares[name]) for name in shares}, **how)


def _first_step(recipe: Recipe) -> int:
    """The step of `run.begin_from` by its name: the checkpoint may be elsewhere."""
    if recipe.run.begin_from is None:
        return 0
    path = Path(recipe.run.begin_from)
    names = [path.resolve().name, *(each.name for each in (path / "checkpoints").glob("step-*"))]
    step = max((int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name))), default=0)
    if step >= recipe.train.steps:
        raise UserError(
            f"run.begin_from: {printable(str(path))} is at step {step}, train.steps is {recipe.train.steps}: steps "
            f"count from the beginning of the first run, so set train.steps to more than {step}"
        )
    return step


def _data(recipe: Recipe, sequence_length: int | None) -> Mixture | None:
    if sequence_length is not None and sequence_length < 1:
        raise UserError(f"--sequence-length {sequence_length}: a sequence has at least one token")
    try:
        data = Mixture.load(recipe.data, global_batch=recipe.train.global_batch)
    except UserError as error:
        if sequence_length is not None:
            return None
        raise UserError(f"{error}; to plan without the data, give --sequence-length S") from None
    if sequence_length not in (None, data.sequence_length):
        raise UserError(
            f"--sequence-length {sequence_length}, but the shards hold sequences of {data.sequence_length} tokens: "
            "leave the option out"
        )
    return data


def _teachers(recipe: Recipe, folder: Path | None) -> dict[str, Any]:
    """Key of each live teacher -> its config."""
    live = {key: str(section.path) for key, section in recipe.teacher_sections.items() if section.is_live}
    if folder is not None and not live:
        raise UserError(f"--teacher-config {folder}: no teacher runs in this recipe: leave the option out")
    if folder is not None and recipe.teachers:
        settings = " ".join(f"--set {key}.path=DIR" for key in live)
        raise UserError(f"--teacher-config {folder}: the recipe has several teachers: give each its own, {settings}")
    if folder is not None:
        return {"teacher": load_config(folder, what="--teacher-config")}
    return {key: _config(key, path) for key, path in live.items()}


def _config(key: str, path: str) -> Any:
    if not (Path(path) / "config.json").exists():
        option = "--teacher-config DIR" if key == "teacher" else f"--set {key}.path=DIR"
        raise UserError(
            f"{not_model(path, f'{key}.path')}; to plan without the weights, name a folder with a config.json: {option}"
        )
    config = load_config(Path(path), what=f"{key}.path")
    if has_all_files(Path(path)):
        check_weights(Path(path), config)
    return config
