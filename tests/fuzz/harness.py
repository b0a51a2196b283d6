"""Cases of the data files in `tables/`, and the comparison of all their outcomes with what a user may expect."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tests.fuzz.place import outside_of
from tests.fuzz.worker import Case, outcomes

LISTED = int(os.environ.get("FUZZ_SHOWN", "40"))
"""Cases that a failure lists."""

Row = TypeVar("Row")
Value = TypeVar("Value")

TABLES = Path(__file__).parent / "tables"


def table(name: str) -> Any:
    return yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8"))


def value_of(text: str) -> str:
    """A value of a table; `x * 1000` there is x, 1000 times."""
    repeated, star, times = text.rpartition(" * ")
    return repeated * int(times) if star and times.isdigit() else text


def pairs(rows: Sequence[Row], values: Sequence[Value], *, each: int) -> list[tuple[Row, Value]]:
    """Each row with `each` of the values, in turn, so that all values occur; FUZZ_ALL=1: with all of them."""
    if os.environ.get("FUZZ_ALL") == "1":
        each = len(values)
    return [
        (row, values[(number * each + place) % len(values)])
        for number, row in enumerate(rows)
        for place in range(min(each, len(values)))
    ]


def require_lines(cases: Sequence[Case], folders: Sequence[Path], *, trains: bool = False) -> None:
    """Runs the cases: each ends with 0, or with a code and its line, within its bounds, and touches nothing outside.

    Args:
        folders: of the fixture.

    Raises:
        AssertionError: lists the cases that do not, with what they do instead.
    """
    original, *copies = folders
    before = [outside_of(folder) for folder in copies]
    complaints = []
    for case, outcome in zip(cases, outcomes(cases, copies, original, trains=trains), strict=True):
        complaint = outcome.complaint()
        if complaint is not None:
            text = f"{case.name[:200]}\n    {complaint}"
            complaints.append(text.encode(errors="backslashreplace").decode())  # pytest's processes send it as UTF-8
    first = "\n".join(complaints[:LISTED])
    assert not complaints, f"{len(complaints)} of {len(cases)} cases, such as:\n{first}"
    assert [outside_of(folder) for folder in copies] == before
