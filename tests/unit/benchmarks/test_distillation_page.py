"""The table of the distillation runs: its arithmetic, what it refuses, and the page in docs/, which is of its CSV."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distillation_page
from benchmarks.distillation import ROWS
from benchmarks.distillation_page import MEASURES, Results, Row, cells, read_results, result_table, write_page
from benchmarks.distillation_plots import draw
from megadistill.errors import UserError

LABELS, FULL = Row("labels", "labels", main=True), Row("full-kl", "full KL", main=True)
HALF = Row("half", "half")


def measured(cross_entropy: float, **others: Any) -> dict[str, Any]:
    deciles = [{"cross_entropy": cross_entropy * i / 5.5} for i in range(1, 11)]
    bins = [{"count": 200, "confidence": i / 21, "accuracy": i / 25} for i in range(1, 21)]
    listed = {"by_decile": deciles, "calibration": bins}
    return {**dict.fromkeys(MEASURES, 0.25), "cross_entropy": cross_entropy, **listed, **others}


def results() -> Results:
    return Results(
        {
            (LABELS, 1): measured(5.0),
            (LABELS, 2): measured(5.3),
            (FULL, 1): measured(4.0),
            (FULL, 2): measured(4.1),
            (HALF, 1): measured(4.5, kl=1.234, acceptance=0.5, calibration_error=0.0123, agreement=0.375),
        },
        measured(3.0),
    )


def test_a_share_is_of_the_gap_of_the_same_seed() -> None:
    measures = results()
    assert measures.shares(LABELS) == [0.0, 0.0]
    assert measures.shares(FULL) == pytest.approx([100.0, 100.0])
    assert measures.shares(HALF) == pytest.approx([50.0])
    worse = Results({**measures.students, (HALF, 2): measured(5.9)}, measures.teacher)
    assert worse.shares(HALF) == pytest.approx([50.0, -50.0])  # of 1.0, and of 1.2
    del worse.students[LABELS, 2]  # type: ignore[attr-defined]
    assert worse.shares(HALF) == pytest.approx([50.0])


def test_a_cell_is_the_mean_and_half_the_range() -> None:
    assert cells(results(), LABELS)[:3] == ("labels", "5.150 ± 0.150", "0 ± 0")
    assert cells(results(), HALF) == ("half", "4.500", "50", "1.234", "0.500", "1.2", "37.5 %")


def test_the_best_row_comes_first() -> None:
    measures = results()
    assert [row.name for row in measures.rows()] == ["full-kl", "half", "labels"]
    # 4.8 is less than the mean 5.15 of labels, but of seed 1 labels have 4.7
    students = {**measures.students, (LABELS, 1): measured(4.7), (HALF, 1): measured(4.8)}
    assert [row.name for row in Results(students, measures.teacher).rows()] == ["full-kl", "labels", "half"]
    alone = Results({(LABELS, 1): measured(5.0), (HALF, 1): measured(4.8)}, measures.teacher)
    assert [row.name for row in alone.rows()] == ["half", "labels"], "without a gap by cross-entropy"


def test_an_evaluation_without_a_measure_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels-1.json"
    path.write_text(json.dumps([measured(3.0), measured(5.0)]))
    assert read_results({(LABELS, 1): path}).students[LABELS, 1]["cross_entropy"] == 5.0
    path.write_text(json.dumps([measured(3.0), measured(5.0, jsd=None)]))
    with pytest.raises(UserError, match=r"labels-1\.json has no jsd"):
        read_results({(LABELS, 1): path})
    with pytest.raises(UserError, match="no run"):
        read_results({})


def run_folders(folder: Path, measures: Results) -> dict[tuple[Row, int], Path]:
    folders = {}
    for row, seed in measures.students:
        run = folders[row, seed] = folder / f"{row.name}-{seed}"
        run.mkdir()
        train = {"steps": 128, "global_batch": 8, "optimizer": {"learning_rate": 0.004}}
        described = {"recipe": {"train": train}, "versions": {"python": "3.11", "torch": "2.13"}}
        (run / "recipe.json").write_text(json.dumps(described))
        steps = [{"step": i, "tokens": 1024 * i, "student_ce": 7.0 - i / 100} for i in range(1, 129)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folders


def test_the_page_is_written_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.csv"
    monkeypatch.setattr(distillation_page, "PAGE", page)
    monkeypatch.setattr(distillation_page, "CSV", numbers)
    marks = "# P\n\n<!-- table: x -->\nold\n<!-- end of table -->\n\nwords\n\n<!-- runs: x -->\n"
    page.write_text(marks + "<!-- end of runs -->\nthe end\n")
    measures = results()
    write_page(measures, run_folders(tmp_path, measures))
    text = page.read_text()
    assert "| half | 4.500 | 50 | 1.234 | 0.500 | 1.2 | 37.5 % |" in text
    assert "old" not in text
    assert "words" in text
    assert text.endswith("the end\n")
    assert "128 steps of 1,024 tokens, learning rate 0.004" in text
    assert "torch 2.13" in text
    with numbers.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["row"], line["seed"], line["cross_entropy"]) for line in lines[-2:]] == [
        ("half", "1", "4.5"),
        ("teacher", "", "3.0"),
    ]


def test_the_figures_are_drawn(tmp_path: Path) -> None:
    measures = results()
    draw(measures, run_folders(tmp_path, measures), tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert sorted(drawn) == [f"distillation-{name}.png" for name in ("calibration", "ce", "curves", "deciles")]
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in drawn.values())


def test_the_page_in_docs_shows_the_numbers_of_its_csv() -> None:
    by_name = {row.name: row for row in ROWS}
    students: dict[tuple[Row, int], dict[str, str]] = {}
    with distillation_page.CSV.open(newline="", encoding="utf-8") as stream:
        *lines, teacher = csv.DictReader(stream)
    for line in lines:
        students[by_name[line["row"]], int(line["seed"])] = line
    measures = Results(students, {name: float(teacher[name]) for name in MEASURES})
    text = distillation_page.PAGE.read_text(encoding="utf-8")
    assert {row.name for row, _ in students} == set(by_name)
    for row in measures.rows():
        assert f"| {' | '.join(cells(measures, row))} |" in text
    for figure in ("ce", "curves", "deciles", "calibration"):
        assert (distillation_page.PAGE.parent / f"distillation-{figure}.png").is_file()


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=80).print(result_table(results()))
    printed = capsys.readouterr().out
    assert "5.150 ± 0.150" in printed
    assert "…" not in printed
    assert "the teacher itself" in printed
