"""Rows of a follower on a page: curves, a table, samples, and whatever else a file of that name may hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megadistill.evaluate.checkpoint_scores import read_scores
from megadistill.report.drawing import style
from megadistill.report.page import report
from megadistill.report.run_record import read_runs
from megadistill.report.sections.checkpoint_section import checkpoint_samples, checkpoint_scores, score_curves
from tests.unit.report.written_run import TOKENS_PER_STEP, WrittenRun


def _row(step: int, scores: Mapping[str, float | None] | None = None, **values: Any) -> dict[str, Any]:
    named = [{"task": task, "metric": "acc", "value": value} for task, value in (scores or {}).items()]
    return {
        "time": 1.0,
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "checkpoint": "a" * 64,
        "settings": {"tasks": list(scores or {})},
        "scores": named,
        **values,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 40 steps with rows on the checkpoints of steps 20 and 40."""
    written = WrittenRun(tmp_path / "run")
    written.begin()
    written.steps(1, 40)
    written.write()
    sample = {"prompt": "<b>&", "text": "\x1b[2J<script>alert(1)</script>", "ended": True}
    rows = [
        _row(20, {"arc": 0.25, "mine<i>": 0.5}),
        _row(40, {"arc": 0.3125}),
        _row(20, {"arc": 0.375}),  # measured again
        _row(40, samples=[sample]),
    ]
    (written.folder / "follow").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (written.folder / "follow" / "follow.jsonl").write_text(f'{{"step": -1}}\n{lines}{{"cut')
    return written.folder


def test_curves_and_tables_are_of_the_later_rows(run: Path) -> None:
    runs = read_runs([run])
    followed = [read_scores(run)]
    table = checkpoint_scores(runs, followed)
    assert table.headings == ["run", "step", "tokens", "arc: acc", "mine<i>: acc"]
    assert [row[1:] for row in table.rows] == [["20", "20,480", "0.3750", "0.5000"], ["40", "40,960", "0.3125", "–"]]
    with style():
        assert [drawing.title for drawing in score_curves(runs, followed)] == ["arc", "mine<i>"]
    (sample,) = checkpoint_samples(runs, followed).rows
    assert sample[1] == "40"
    assert sample[3].endswith("(end of the document)")


def test_a_page_has_them_and_no_text_of_a_model_is_markup(run: Path) -> None:
    html = report([run], evaluations=[], output=None, now=1_700_001_000.0).read_text(encoding="utf-8")
    assert '<h2 id="checkpoints">' in html
    assert "0.3750" in html
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "\x1b" not in html
    assert "follow/follow.jsonl: 1 damaged rows left out" in html
    assert (run / "report" / "score-1-arc.png").is_file()


@pytest.mark.parametrize("content", ["", "7\n[]\n", '{"step": 1e400}\n', "\0" * 100 + "\n"])
def test_a_file_of_anything_is_no_checkpoint_and_no_error(content: str, run: Path) -> None:
    (run / "follow" / "follow.jsonl").write_text(content)
    followed = [read_scores(run)]
    assert followed == [[]]
    runs = read_runs([run])
    assert not checkpoint_scores(runs, followed).rows
    assert not checkpoint_samples(runs, followed).rows
    assert score_curves(runs, followed) == []
