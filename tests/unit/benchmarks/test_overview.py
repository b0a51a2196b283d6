"""The page of benchmarks: the newest of each question, in fitting units, and the page in docs/ as it is written."""

from pathlib import Path

import pytest

from benchmarks import overview
from benchmarks.markdown import put
from benchmarks.overview import amount, newest, tables
from megadistill.errors import UserError
from megadistill.export.markdown import table


def line(contender: str, commit: str, median: float, *, question: str = "speed", unit: str = "s") -> dict[str, str]:
    return {
        **{
            "date": "2026-01-01",
            "commit": commit,
            "cpu": "C",
            "cores": "2",
            "threads": "1",
            "python": "3",
            "torch": "2",
        },
        **{"question": question, "shape": "N 1", "contender": contender, "unit": unit, "repeats": "7"},
        **{"median": str(median), "low": "0.5", "high": "2", "ratio": "", "ratio_to": ""},
    }


def test_the_last_run_of_each_question_is_on_the_page() -> None:
    lines = [line("gone", "a", 9), line("ours", "a", 9), line("ours", "b", 2), line("ours", "b", 1)]
    lines.append(line("kept", "a", 3, question="memory"))
    assert [(line["contender"], line["median"]) for line in newest(lines)] == [("ours", "1"), ("kept", "3")]


def test_a_table_says_what_it_was_measured_on() -> None:
    text = tables([line("ours", "b", 1.5)])
    assert "### speed: N 1" in text
    assert "| ours | 1.5 s | 0.5 s to 2 s |  |  |" in text
    assert "commit b; C, 2 cores, 1 threads; Python 3, torch 2; 7 rounds." in text


@pytest.mark.parametrize(
    ("value", "unit", "cell"),
    [
        (1.23456, "s", "1.23 s"),
        (0.00446, "s", "4.46 ms"),
        (0.0446, "cpu s", "44.6 cpu ms"),
        (5.11647e9, "bytes", "5,116 MB"),
    ],
)
def test_amounts_have_fitting_units(value: float, unit: str, cell: str) -> None:
    assert amount(value, unit) == cell


def test_a_part_goes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- t: by x -->\nold\n<!-- end of t -->\nb\n")
    put(page, "t", r"new \1")
    put(page, "t", r"newer \1")
    assert page.read_text() == "a\n<!-- t: by x -->\n\nnewer \\1\n\n<!-- end of t -->\nb\n"
    with pytest.raises(UserError, match="0 places for u"):
        put(page, "u", "new")


def test_numbers_are_set_to_the_right() -> None:
    assert table(("a", "b"), [("x", "1")], left=1) == "| a | b |\n|---|---:|\n| x | 1 |"


def test_the_pages_in_docs_are_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = {subject: tmp_path / page.name for subject, page in overview.PAGES.items()}
    copy_of = {overview.PAGE: tmp_path / "benchmarks.md"}
    copy_of |= {page: copies[subject] for subject, page in overview.PAGES.items()}
    for page, copy in copy_of.items():
        copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(overview, "PAGE", copy_of[overview.PAGE])
    monkeypatch.setattr(overview, "PAGES", copies)
    overview.main()
    for page, copy in copy_of.items():
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
