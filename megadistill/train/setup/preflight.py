"""Checks that recipe, data and models fit together, before a run starts."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadistill.config.auto import NO_TRITON, has_triton, install_for_triton, missing_for_triton
from megadistill.config.recipe import LossSection, Recipe
from megadistill.data import Mixture, missing_rows, no_tokenizer_files, tokenizer_difference, tokenizer_files
from megadistill.data.targets.target_manifest import TargetManifest
from megadistill.divergence import Divergence
from megadistill.errors import UserError
from megadistill.models.configs.unequal_layers import first_layers
from megadistill.models.experts import ROUTER_COEF_KEYS
from megadistill.models.families import DROPOUTS, expert_layers
from megadistill.models.initial_weights import check_initial_weights


def check_fit(
    recipe: Recipe, data: Mixture, student: Any, teacher: Any | None, *, stages: int, vocab_map: Tensor | None
) -> None:
    """Checks sequence length, vocabulary and stages. `vocab_map`: content of `teacher.vocab_map`, if any.

    Raises:
        UserError: the first mismatch, with both values and the way out.
    """
    _positions_fit("student.config", student, data)
    if drops := [name for name in DROPOUTS if getattr(student, name, 0.0)]:
        raise UserError(
            f"student.config: {drops[0]} is {getattr(student, drops[0])}; pretraining here uses none, and a resume "
            f"could not repeat it on another number of ranks: set {' and '.join(drops)} to 0"
        )
    check_routers(recipe.loss, student)
    if recipe.student.activation_checkpointing == "selective" and getattr(student, "clip_qkv", None) is not None:
        raise UserError(
            f"student.config: clip_qkv is {student.clip_qkv}, which clips products in place, and "
            "student.activation_checkpointing selective keeps them: take full or none"
        )
    source = recipe.student.config
    rows = declared_rows(recipe, student)
    problem = None if rows is None else missing_rows(rows, data.sources.values())
    if problem is not None:
        way_out = (
            f"tokenize the text with the folder's own tokenizer (megadistill tokenize ... --tokenizer {source}), or "
            "give the sizes in student.config without vocab_size"
            if isinstance(source, str)
            else "leave vocab_size out"
        )
        raise UserError(f"student.config: {problem}: {way_out} (the data decides, and student.vocab_multiple pads)")
    if teacher is None:
        return
    assert recipe.teacher is not None
    _positions_fit("teacher.path", teacher, data)
    most = len(first_layers(teacher))
    if stages > most:
        key = "distributed.vocab_group" if recipe.teacher.placement == "colocated" else "teacher.stages"
        layers = teacher.num_hidden_layers
        together = "" if most == layers else f", the last {layers - most + 1} of which stay in one stage"
        if together and getattr(teacher, "indexer_types", None):
            together = f", and takes a stage for each of {most} that have an indexer"
        raise UserError(
            f"{key} is {stages}, so the teacher is cut into {stages} stages, but teacher.path has "
            f"{layers} layers{together}: set {key} to {most} or less"
        )
    if vocab_map is not None:  # the map replaces the comparison of tokenizers
        check_divergence(recipe.loss, vocab_map)


def check_tokenizers(recipe: Recipe, data: Mixture, teacher: Any | None) -> None:
    """Compares the tokenizers of the models' folders with the data's: seconds, and 250 MB, for 256k pieces.

    Raises:
        UserError: one is missing, or another.
    """
    if isinstance(recipe.student.config, str):
        _same_tokenizer(Path(recipe.student.config), data, key="student.config")
    section = recipe.teacher
    if teacher is not None and section is not None and section.vocab_map is None:
        _teacher_reads_the_ids(Path(str(section.path)), teacher, data)


def _teacher_reads_the_ids(folder: Path, teacher: Any, data: Mixture) -> None:
    """Raises UserError: the teacher has fewer ids than the data, or another tokenizer."""
    ways_out = (
        f"tokenize the text with the teacher's own (megadistill tokenize ... --tokenizer {folder}), or map the ids "
        "with teacher.vocab_map (megadistill vocab-map)"
    )
    if not tokenizer_files(folder):
        raise UserError(
            f"teacher.path: {no_tokenizer_files(folder)}, so its ids cannot be compared with those of the shards: add "
            f"the files that the teacher was published with, and {ways_out}"
        )
    difference = _difference("teacher.path", folder, data)
    problem = missing_rows(teacher.vocab_size, data.sources.values())
    if problem is not None and difference is None:
        raise UserError(
            f"teacher.path: {problem}, as the tokenizer in {folder} gives it: remove the tokens from id "
            f"{teacher.vocab_size} on from the tokenizer, and {ways_out}"
        )
    if problem is not None:
        raise UserError(f"teacher.path: {problem}: {ways_out}")
    if difference is not None:
        raise UserError(f"teacher.path: its tokenizer is not that of the shards: {difference}: {ways_out}")


def check_routers(loss: LossSection, student: Any) -> None:
    """Checks the settings of a student's routers.

    Raises:
        UserError: noise at their inputs, or weights of their losses in the recipe of a student without experts.
    """
    if getattr(student, "router_jitter_noise", 0.0):
        raise UserError(
            f"student.config: router_jitter_noise is {student.router_jitter_noise}; the routers here read no noise, "
            "which a resume could not repeat on another number of ranks: set it to 0 (of a folder, in a copy of its "
            "config.json)"
        )
    given = {name: value for name in ROUTER_COEF_KEYS if (value := getattr(loss, name)) is not None}
    if given and not expert_layers(student):
        name, value = next(iter(given.items()))
        raise UserError(
            f"loss.{name} is {value:g}, but the {student.model_type} model of student.config has no experts: remove it"
        )


def declared_rows(recipe: Recipe, student: Any) -> int | None:
    """Rows of the vocabulary that `student.config` names; None: it names none.

    More than the data has ids are padding, as a teacher's are: the student gets a row for each id, and those of
    `student.vocab_multiple`.
    """
    source = recipe.student.config
    return int(student.vocab_size) if isinstance(source, str) or "vocab_size" in source else None


def model_rows(recipe: Recipe, data: Mixture, student: Any, teacher: Any | None) -> tuple[int | None, ...]:
    """Rows of the vocabulary of each model that reads the data's ids; None for one that does not decide.

    A run learns from stored targets with the rows of the model that they were computed with.

    Raises:
        UserError: the stored targets cannot be read.
    """
    section, live, stored = recipe.teacher, None, None
    if section is not None and section.source == "stored" and section.targets is not None:
        key = TargetManifest.load(section.targets).key
        stored = key.vocab_size if key.tokenizer == data.tokenizer.sha256 else None  # others are refused when read
    if section is not None and teacher is not None and section.vocab_map is None:
        live = int(teacher.vocab_size)
    return declared_rows(recipe, student), live, stored


def check_start(folder: Path, student: Any, data: Mixture) -> None:
    """Checks that the weights in `folder` fit the model `student` and the data's ids.

    Raises:
        UserError: they do not.
    """
    check_initial_weights(folder, student, vocab_size=data.vocab_size)
    _same_tokenizer(folder, data, key="student.weights")


def _same_tokenizer(folder: Path, data: Mixture, *, key: str) -> None:
    """Compares the tokenizer of a student's folder with the data's, if it has one."""
    difference = _difference(key, folder, data) if tokenizer_files(folder) else None
    if difference is not None:
        raise UserError(
            f"{key}: the tokenizer of {folder} is not that of the shards: {difference}: tokenize the text with the "
            f"folder's (megadistill tokenize ... --tokenizer {folder}), or name a folder without a tokenizer (an "
            "export gets that of the shards)"
        )


def _difference(key: str, folder: Path, data: Mixture) -> str | None:
    """`tokenizer_difference` of the folder that `key` names."""
    try:
        return tokenizer_difference(folder, data.first)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def check_compiler(recipe: Recipe) -> None:
    """Checks for the compiler that torch would look for at the first step.

    Raises:
        UserError: a key of the recipe asks for compiled code, and an accelerator lacks Triton, or a CPU a C++ compiler.
    """
    keys = {
        "loss.elementwise is compiled": recipe.loss.elementwise == "compiled",
        "student.compile is true": recipe.student.compile is True,
        "teacher.compile is true": recipe.teacher is not None and recipe.teacher.compile is True,
    }
    first = next((words for words, compiled in keys.items() if compiled), None)
    if first is None:
        return
    key = first.partition(" ")[0]
    eager = "eager" if key == "loss.elementwise" else "false"
    if torch.accelerator.is_available():
        if not has_triton():
            missing = missing_for_triton() or NO_TRITON
            raise UserError(
                f"{first}, which needs Triton on an accelerator, and {missing}: {install_for_triton(missing)}, or set "
                f"{key} to auto or {eager}"
            )
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{first}, which needs a C++ compiler on a CPU, and {compiler} is not on the PATH: install g++, name "
            f"another in the environment variable CXX (as in CXX=clang++), or set {key} to {eager}"
        )


def check_divergence(loss: LossSection, vocab_map: Tensor) -> None:
    """Checks that the divergence is finite where the teacher has no id for one of the student's.

    Raises:
        UserError: it is not, and `vocab_map` [true vocabulary] has such ids (-1).
    """
    unknown = int((vocab_map < 0).sum())
    spec = Divergence(loss.divergence, parameter=loss.parameter).formula.spec
    if unknown and not spec.finite_at_zero:
        raise UserError(
            f"loss.divergence: {spec.title}, is infinite where the teacher gives no probability, and teacher.vocab_map "
            f"leaves {unknown} ids without one of the teacher's: choose another divergence"
        )


def _positions_fit(what: str, config: Any, data: Mixture) -> None:
    if data.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"{what}: max_position_embeddings is {config.max_position_embeddings}, the shards hold sequences of "
            f"{data.sequence_length} tokens: raise it, or tokenize with --sequence-length "
            f"{config.max_position_embeddings}"
        )
