"""The ground floor: the few errors of the package and the exit code of each. It knows nothing else.

| error          | exit | who mends it                                   |
|----------------|------|------------------------------------------------|
| UserError      | 2    | the user: one line says what, the value, the way out |
| RestartFault   | 3    | a restart: the sbatch files requeue on it      |
| OperatorFault  | 4    | a person: the sbatch files do not requeue      |
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong (a recipe, an argument, a file). Shown as one line, without a traceback."""

    exit_code = 2


class RankUserError(UserError):
    """The input is wrong as one rank met it, after the ranks had joined: that rank says so, whoever it is."""


class RestartFault(RuntimeError):
    """Something broke that starting again from the newest checkpoint can mend."""

    exit_code = 3


class OperatorFault(RuntimeError):
    """Something broke that a restart would only repeat: a person has to look."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
