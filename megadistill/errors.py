"""Errors of the package, by who has to act, and the exit code of each.

| error          | exit | action                                               |
|----------------|------|------------------------------------------------------|
| UserError      | 2    | the user corrects the input that the message names   |
| RestartFault   | 3    | a restart: the sbatch files requeue                  |
| OperatorFault  | 4    | a person investigates: the sbatch files do not       |
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input (a recipe, an argument, a file). Shown as one line, without a traceback."""

    exit_code = 2


class RankUserError(UserError):
    """Invalid input that one rank found after the ranks had joined: that rank prints it, whichever it is."""


class RestartFault(RuntimeError):
    """A failure that a restart from the latest checkpoint may fix."""

    exit_code = 3


class OperatorFault(RuntimeError):
    """A failure that a restart would repeat: a person has to investigate."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
