"""The lines of events.jsonl and metrics.jsonl that this program has written, from the first or from the last."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megadistill.errors import UserError
from megadistill.events.lines import LineFromEnd, lines_from_end, scan_lines
from megadistill.units import number_of

logger = logging.getLogger(__name__)

LARGEST_COUNT = 1 << 62
"""Steps, attempts and other integers of a line: larger ones are damage."""


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run folder's events.jsonl that have the keys of an event; a warning counts the others.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    return (values for _, values in _valid_lines(folder / "events.jsonl", is_event))


def read_metrics(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a run folder's metrics.jsonl that have the numbers of a step, and these; a warning counts the
    others.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    return _valid_lines(folder / "metrics.jsonl", _is_step)


def events_from_end(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of `read_events` from the last to the first; only what is taken of them is read.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    return (values for _, values in _valid_from_end(folder / "events.jsonl", is_event))


def metrics_from_end(folder: Path) -> Iterator[tuple[LineFromEnd, dict[str, Any]]]:
    """The lines of `read_metrics` from the last to the first; only what is taken of them is read.

    Raises:
        UserError: a folder, a pipe or a device has the file's name.
    """
    return _valid_from_end(folder / "metrics.jsonl", _is_step)


def last_step(folder: Path) -> int | None:
    """The last step in metrics.jsonl, of which only the end is read; None where there is none."""
    try:
        return next((int(values["step"]) for _, values in metrics_from_end(folder)), None)
    except UserError:
        return None


def _valid_lines(path: Path, is_valid: Callable[[Mapping[str, Any]], bool]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    count, first = 0, 0
    for number, line, values in scan_lines(path):
        if values is not None and is_valid(values):
            yield line, values
        else:
            count, first = count + 1, first or number
    _warn_of_others(path, count, f"the first is line {first:,}")


def _valid_from_end(
    path: Path, is_valid: Callable[[Mapping[str, Any]], bool]
) -> Iterator[tuple[LineFromEnd, dict[str, Any]]]:
    count, last = 0, 0
    try:
        for line in lines_from_end(path):
            if line.values is not None and is_valid(line.values):
                yield line, line.values
            else:
                count, last = count + 1, last or line.offset
    finally:  # most readers stop early
        _warn_of_others(path, count, f"the last of them begins at byte {last:,}")


def _warn_of_others(path: Path, count: int, where: str) -> None:
    if count and (path, count) not in _WARNED:
        _WARNED.add((path, count))
        lines = number_of(count, "line")
        logger.warning("%s: %s that this program has not written, left out; %s", path, lines, where)


_WARNED: set[tuple[Path, int]] = set()
"""Files whose other lines were counted in a warning, with their number: a file is read more than once."""


def is_event(values: Mapping[str, Any]) -> bool:
    """Whether a line has the keys that every event has, of their types."""
    return (
        isinstance(values.get("event"), str)
        and is_number(values.get("time"))
        and is_count(values.get("attempt"))
        and is_count(values.get("step"))
    )


def _is_step(values: Mapping[str, Any]) -> bool:
    numbers = (values[name] for name in ("loss", "student_ce", "teacher_ce", "seconds") if name in values)
    return is_count(values.get("step")) and all(number is None or is_number(number) for number in numbers)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_COUNT)


def seconds_of(values: Mapping[str, Any], name: str) -> float:
    """A cost of an event or a step; 0 where it has none."""
    value = values.get(name)
    seconds = float(value) if value is not None and is_number(value) else 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
