"""Errors of the package, by who has to act, and the exit code of each.

| error          | exit | action                                               |
|----------------|------|------------------------------------------------------|
| UserError      | 2    | the user corrects the input that the message names   |
| RestartFault   | 3    | a restart: the sbatch files requeue                  |
| OperatorFault  | 4    | a person investigates: the sbatch files do not       |
"""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Invalid input (a recipe, an argument, a file). Shown as one line, without a traceback."""

    exit_code = 2
    lines: Sequence[str] = ()
    """The lines of several mistakes. Empty: the message is one line, whatever it holds."""


class RankUserError(UserError):
    """Invalid input that one rank found after the ranks had joined: that rank prints it, whichever it is."""

    prints = True
    """Whether this rank prints it; False where the one that found it has sent it."""


class RestartFault(RuntimeError):
    """A failure that a restart from the latest checkpoint may fix."""

    exit_code = 3
    prints = True
    """Whether this rank prints it; False where another rank of its node has printed the same."""


class OperatorFault(RuntimeError):
    """A failure that a restart would repeat: a person has to investigate."""

    exit_code = 4
    prints = True
    """See `RestartFault`."""


def several(source: str, mistakes: Sequence[tuple[str, str]], *, noun: str = "mistakes") -> UserError:
    """The error of an input with mistakes, each (where, what): one line for one; for several a heading and their lines.

    `where` may begin with `source`, or be empty.
    """
    if len(mistakes) == 1:
        where, what = mistakes[0]
        return UserError(f"{where or source}: {what}")
    lines = [f"  {where.removeprefix(f'{source}, ')}: {what}" if where else f"  {what}" for where, what in mistakes]
    lines.insert(0, f"{source}: {len(mistakes)} {noun}")
    error = UserError("\n".join(lines))
    error.lines = lines
    return error


class Superseded(OperatorFault):
    """A later attempt has acquired the run folder: this one ends, and the run continues there."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    close = nearest_of(word, known)
    return f"; did you mean '{close}'?" if close else ""


def nearest_of(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word closest to `word`, capitals and hyphens aside; None: none is close."""
    plain = {each.lower().replace("-", "_"): each for each in reversed(list(known))}
    written = word.lower().replace("-", "_")
    close = [each for each in reversed(plain) if len(written) > 3 and each.startswith(f"{written}_")]
    close = close or difflib.get_close_matches(written, plain, n=1, cutoff=cutoff)
    return plain[close[0]] if close else None
