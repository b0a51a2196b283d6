"""The keys of one of several teachers: `teachers.NAME.KEY` for `teacher.KEY`, and back."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from megadistill.errors import UserError


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
