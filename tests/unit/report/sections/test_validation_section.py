"""The validations of runs on a page: curves by split, a table, and files of anybody."""

import json
import os
from pathlib import Path

import pytest

from megadistill.report.page import compose
from megadistill.report.run_record import RunRecord, read_runs
from megadistill.report.sections.validation_section import validation_table, validations_of
from tests.unit.report.written_run import WrittenRun


def _validate(folder: Path, step: int, ce: float, *, name: str = "web") -> None:
    measures = {"tokens": 100, "cross_entropy": ce, "kl": ce / 8, "agreement": 0.5, "teacher_cross_entropy": 2.0}
    other = {"tokens": 50, "cross_entropy": ce + 1}
    together = {"tokens": 150, "cross_entropy": ce + 1 / 3}  # the measures that all splits have
    line = {"time": 1.0, "step": step, "tokens": 1024 * step, "seconds": 3.0}
    with open(folder / "validation.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "splits": {"all": together, name: measures, "code": other}}) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.steps(1, 3)
    run.lines = [{name: line[name] for name in ("time", "step", "tokens", "loss")} for line in run.lines]
    run.write()
    for step, ce in ((0, 5.0), (2, 3.0), (3, 4.0)):
        _validate(run.folder, step, ce)
    return run.folder


def _run(folder: Path) -> RunRecord:
    (run,) = read_runs([folder])
    return run


def test_the_table_has_the_last_validation_and_the_lowest_cross_entropy(folder: Path) -> None:
    table = validation_table([_run(folder)], [validations_of(_run(folder), [])])
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["split"] for row in rows] == ["all", "web", "code"]
    web, code = rows[1:]
    assert (web["step"], web["tokens"], web["CE"], web["lowest CE"]) == ("3", "100", "4.0000", "3.0000 at step 2")
    assert (web["teacher's CE"], web["KL"], web["agreement"], web["acceptance"]) == ("2.0000", "0.5000", "50.0%", "–")
    assert (code["KL"], code["calibration error"]) == ("–", "–")


def test_the_page_has_a_figure_for_each_measure_and_names_and_numbers_of_anybody_break_nothing(folder: Path) -> None:
    _validate(folder, 3, 1e300, name="<script>\x1b[31m" + "x" * 500)
    page = compose([_run(folder)], [], now=0.0)
    names = [drawing.name for drawing in page.drawings if drawing.name.startswith("validation")]
    assert names == ["validation-cross-entropy", "validation-kl", "validation-agreement"]
    assert '<h2 id="validation">Validation</h2>' in page.html
    assert "all splits" in page.html
    assert "<script>" not in page.html
    assert "\x1b" not in page.html


def test_a_pipe_in_the_files_place_is_noted(folder: Path) -> None:
    (folder / "validation.jsonl").unlink()
    os.mkfifo(folder / "validation.jsonl")
    notes: list[str] = []
    assert validations_of(_run(folder), notes) == []
    assert "validation.jsonl cannot be read" in notes[0]
