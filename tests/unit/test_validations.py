"""validation.jsonl: lines of anybody, lines that are taken back, and the best validation so far."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megadistill.events import ALL, VALIDATIONS, ValidationHistory, drop_validations_after, numbers_of, read_validations


def _line(step: int, ce: float | None) -> dict[str, Any]:
    measures = {"tokens": 10} if ce is None else {"tokens": 10, "cross_entropy": ce}
    return {"time": 1.5, "step": step, "tokens": 8 * step, "seconds": 0.5, "splits": {ALL: measures, "web": measures}}


def _write(folder: Path, *lines: object) -> None:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / VALIDATIONS).write_text("".join(f"{line}\n" for line in text), encoding="utf-8")


def test_progress_counts_the_validations_since_the_best_one() -> None:
    steps = [_line(0, 5.0), _line(2, 4.0), _line(4, 4.0), _line(6, None), _line(8, 4.5)]
    tokens = {ALL: 10, "web": 10}
    assert ValidationHistory.of(steps) == ValidationHistory(5, 8, 4.0, 2, 3, tokens)
    after = ValidationHistory.of(steps).after(10, _line(10, 3.5)["splits"])
    assert after == ValidationHistory(6, 10, 3.5, 10, 0, tokens)
    assert ValidationHistory.of([]) == ValidationHistory(0, -1, math.inf, 0, 0)


def test_progress_begins_anew_with_other_rows() -> None:
    other = {ALL: {"tokens": 12, "cross_entropy": 6.0}, "web": {"tokens": 12, "cross_entropy": 6.0}}
    history = ValidationHistory.of([_line(0, 5.0), _line(2, 5.5)]).after(4, other)
    assert history == ValidationHistory(3, 4, 6.0, 4, 0, {ALL: 12, "web": 12})


def test_a_validation_without_a_token_tells_nothing() -> None:
    unread: dict[str, Any] = {ALL: {"tokens": 0}, "web": {"tokens": 0}}
    assert ValidationHistory().after(0, unread) == ValidationHistory(1, 0)
    history = ValidationHistory.of([_line(0, 5.0), _line(2, 5.5)])
    after = history.after(4, unread)
    assert (after.validations, after.last_step, after.without_gain) == (3, 4, 1)
    assert after.after(6, _line(6, 4.5)["splits"]).best_step == 6


def test_later_lines_and_those_of_others_are_taken_out_and_earlier_ones_stay_as_they_are(tmp_path: Path) -> None:
    others = ["no json", {"step": 2}, {**_line(2, 4.0), "splits": {ALL: {"cross_entropy": "4"}}}, [1]]
    _write(tmp_path, _line(0, 5.0), *others, _line(2, 4.0), _line(4, 3.0))
    assert [line["step"] for line in read_validations(tmp_path)] == [0, 2, 4]
    drop_validations_after(tmp_path, 2)
    assert list(read_validations(tmp_path)) == [_line(0, 5.0), _line(2, 4.0)]
    before = (tmp_path / VALIDATIONS).stat()
    drop_validations_after(tmp_path, 2)
    assert (tmp_path / VALIDATIONS).stat().st_ino == before.st_ino, "written only where there is something to take out"


@pytest.mark.parametrize("splits", [{"web": 5}, {"web": {"kl": None}}, {"web": {"kl": True}}, [], None])
def test_splits_of_another_form_are_no_validation(splits: object, tmp_path: Path) -> None:
    _write(tmp_path, {**_line(2, 4.0), "splits": splits})
    assert list(read_validations(tmp_path)) == []


def test_a_run_without_validations_has_no_file(tmp_path: Path) -> None:
    drop_validations_after(tmp_path, 0)
    assert list(read_validations(tmp_path)) == []
    assert not (tmp_path / VALIDATIONS).exists()


def test_numbers_are_named_by_measure_and_split() -> None:
    assert numbers_of({"web": {"tokens": 10, "kl": 0.5}}) == {"validation/kl/web": 0.5}
