"""validation.jsonl: a line for each validation of a run, and the best of them.

A line has `time` (seconds since 1970), `step`, `tokens` (of the training stream up to the step), `seconds` of the
validation, and `splits`: name -> measures, of `ALL` and of each split.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megadistill.events.lines import json_lines
from megadistill.events.reading import is_count, is_number
from megadistill.io import write_file

VALIDATIONS = "validation.jsonl"

PLATEAU = "validation.stop"
"""Reason of the event `stopped` of a run that ends since its patience is used up."""

ALL = "all"
"""Name of the measures over all splits, which no split has."""


@dataclass(frozen=True)
class ValidationHistory:
    """The best validation of a run so far."""

    validations: int = 0
    last_step: int = -1
    """Step of the last validation; -1: none."""
    best: float = math.inf
    """Lowest cross-entropy over all splits (nats a token)."""
    best_step: int = 0
    without_gain: int = 0
    """Validations since the best one."""
    tokens: Mapping[str, float] = field(default_factory=dict)
    """Tokens of each split in the last validation."""

    def after(self, step: int, splits: Mapping[str, Mapping[str, float]]) -> "ValidationHistory":
        """The history with one more validation. One that is not finite is no gain; one of other rows, as of a changed
        `validation.data`, cannot be compared with those before it, and is the best one; one without a token does not
        count."""
        count, cross_entropy = self.validations + 1, cross_entropy_of(splits)
        tokens = {name: each.get("tokens", 0) for name, each in splits.items()}
        if not tokens.get(ALL, 0):  # none could be read, which tells nothing of the student
            return replace(self, validations=count, last_step=step)
        before = self if tokens == self.tokens else ValidationHistory()
        if cross_entropy < before.best:
            return ValidationHistory(count, step, cross_entropy, step, 0, tokens)
        return ValidationHistory(count, step, before.best, before.best_step, before.without_gain + 1, tokens)

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> "ValidationHistory":
        """After the validations of `read_validations`."""
        history = cls()
        for line in lines:
            history = history.after(line["step"], line["splits"])
        return history


def cross_entropy_of(splits: Mapping[str, Mapping[str, float]]) -> float:
    """The student's cross-entropy over all splits (nats a token); NaN where it is unknown."""
    return float(splits.get(ALL, {}).get("cross_entropy", math.nan))


def numbers_of(splits: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The measures of a validation by `validation/MEASURE/SPLIT`, without the numbers of tokens."""
    return {
        f"validation/{name}/{split}": value
        for split, measures in splits.items()
        for name, value in measures.items()
        if name != "tokens"
    }


def read_validations(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run folder's validation.jsonl that have the keys of one, in the file's order; others are left out.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    return (line for line in json_lines(folder / VALIDATIONS) if line is not None and _is_validation(line))


def drop_validations_after(folder: Path, step: int) -> None:
    """Removes the lines of later steps, which are taken again, and those that are damaged."""
    path = folder / VALIDATIONS
    lines = list(json_lines(path))
    earlier = [line for line in lines if line is not None and _is_validation(line) and line["step"] <= step]
    if len(earlier) < len(lines):
        write_file(path, "".join(f"{json.dumps(line)}\n" for line in earlier))


def _is_validation(line: Mapping[str, Any]) -> bool:
    splits = line.get("splits")
    return (
        all(is_number(line.get(name)) for name in ("time", "seconds"))
        and all(is_count(line.get(name)) for name in ("step", "tokens"))
        and isinstance(splits, dict)
        and all(isinstance(each, dict) and all(map(is_number, each.values())) for each in splits.values())
    )
