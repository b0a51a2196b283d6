"""Numbers by source and teacher on a page: curves, a table, and names and numbers of anybody."""

from pathlib import Path
from typing import Any

import pytest

from megadistill.report.page import compose
from megadistill.report.run_record import RunRecord, read_runs
from megadistill.report.sections.group_section import MAX_GROUPS, group_table, groups_of
from tests.unit.report.written_run import RECIPE, WrittenRun

HOSTILE = "<script>\x1b[31m$\\frac$" + "x" * 500


def _run(folder: Path, *, groups: dict[str, Any], several: bool = True) -> RunRecord:
    run = WrittenRun(folder)
    run.begin()
    for step in range(1, 5):
        code = {"labels": 100, "kl": 4.0 / step, "student_ce": 3.0, "teacher_ce": 2.0, "agreement": 0.5}
        by_source = {"web": {**code, "kl": 8.0 / step}, **({"code": code} if step % 2 else {}), **groups}
        run.steps(step, step, by_source=by_source, by_teacher={"coder": code})
    run.lines = [
        {name: line[name] for name in ("time", "step", "tokens", "loss", "by_source", "by_teacher")}
        for line in run.lines
    ]
    teachers = {"teacher": None, "teachers": {"coder": {"path": "models/coder"}}} if several else {}
    (record,) = read_runs([run.write({**RECIPE, **teachers})])
    return record


def test_the_table_has_the_last_values_of_each_source_and_teacher(tmp_path: Path) -> None:
    run = _run(tmp_path, groups={})
    table = group_table([run], [groups_of(run)])
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [(row["by"], row["name"]) for row in rows] == [("source", "web"), ("source", "code"), ("teacher", "coder")]
    assert rows[0]["KL"] == f"{8 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4:.4f}"
    assert rows[1]["KL"] == f"{4 * (1 + 1 / 3) / 2:.4f}", "of the steps in which it has tokens"
    assert (rows[1]["tokens a step"], rows[1]["teacher's CE"], rows[1]["agreement"]) == ("100", "2.0000", "50.0%")
    assert rows[1]["KL of targets"] == "–"


def test_the_page_has_a_figure_for_each_kind_and_measure(tmp_path: Path) -> None:
    page = compose([_run(tmp_path, groups={HOSTILE: {"kl": 1e300, "student_ce": 1.0, "labels": True}})], [], now=0.0)
    names = [drawing.name for drawing in page.drawings if drawing.name.startswith("by-")]
    assert names == ["by-source-kl", "by-source-student-ce", "by-teacher-kl", "by-teacher-student-ce"]
    assert '<h2 id="groups">By source and teacher</h2>' in page.html
    assert "<script>" not in page.html
    assert "\x1b" not in page.html


@pytest.mark.parametrize("groups", [{"web": 3, "code": [1]}, {str(each): {"kl": 1.0} for each in range(100)}])
def test_what_no_run_writes_is_left_out(tmp_path: Path, groups: dict[str, Any]) -> None:
    read = groups_of(_run(tmp_path, groups=groups))
    assert len(read) <= MAX_GROUPS + 1
    assert all(len(each.tokens) <= 4 for each in read)


def test_a_run_with_one_teacher_has_no_such_part(tmp_path: Path) -> None:
    run = _run(tmp_path, groups={}, several=False)
    assert groups_of(run) == []
    assert "groups" not in compose([run], [], now=0.0).html.split("</style>")[1]
