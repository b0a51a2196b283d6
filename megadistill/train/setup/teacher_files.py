"""The files of a recipe's teacher, read before a run starts; and the keys of one of several, `teachers.NAME.KEY`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megadistill.config.recipe import Recipe
from megadistill.data import Mixture
from megadistill.errors import UserError
from megadistill.models.families import load_config, refuse_documents
from megadistill.train.setup.vocab_map import read_vocab_map


@dataclass(frozen=True)
class TeacherFiles:
    """The config and the map of ids of a live teacher; None for others."""

    config: Any | None = None
    vocab_map: Tensor | None = None
    """[ids of the data] int64: the teacher's id for each of the student's; None where they are the same."""

    def for_ids(self, number: int) -> "TeacherFiles":
        """The same with the map of the first `number` ids, which the models have."""
        return self if self.vocab_map is None else replace(self, vocab_map=self.vocab_map[:number])


def read_teacher(recipe: Recipe, data: Mixture, *, name: str | None = None) -> TeacherFiles:
    """The files of `recipe.teacher`, which is the one of this `name` of several.

    Raises:
        UserError: one cannot be read.
    """
    teacher = recipe.teacher
    if teacher is None or not teacher.is_live:
        return TeacherFiles()
    with keys_of_teacher(name):
        config = load_config(Path(str(teacher.path)), what="teacher.path")
        if recipe.data.document_mask:
            refuse_documents(config, "teacher.path", sequence_length=data.sequence_length)
        if teacher.vocab_map is None:
            return TeacherFiles(config)
        ids = {"student_ids": data.vocab_size, "teacher_ids": config.vocab_size}
        return TeacherFiles(config, read_vocab_map(Path(teacher.vocab_map), **ids))


def key_of_any_teacher(key: str) -> str:
    """`teacher.KEY` for the key `teachers.NAME.KEY`: what holds of one teacher holds of each of several."""
    return re.sub(r"^teachers\.[^.]+\.", "teacher.", key)


@contextmanager
def keys_of_teacher(name: str | None) -> Iterator[None]:
    """Has messages about `teacher.path` and other keys of a teacher name those of one of several.

    Raises:
        UserError: that of the body, which may name the keys of a recipe with this teacher alone.
    """
    try:
        yield
    except UserError as error:
        if name is None:
            raise
        raise UserError(of_teacher(str(error), name)) from error


def of_teacher(text: str, name: str) -> str:
    """The text with the keys `teacher.KEY` as those of the teacher of this name."""
    return re.sub(r"\bteacher\.(?=[a-z])", f"teachers.{name}.", text)
