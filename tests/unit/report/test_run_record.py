"""Run folders that are damaged, incomplete or from anybody: what can be read is read, and the rest is noted."""

import json
import math
from pathlib import Path

import pytest

from megadistill.errors import UserError
from megadistill.redaction import printable
from megadistill.report.curves import curves_over_tokens
from megadistill.report.run_record import distinct_names, number, read_run, read_runs
from tests.unit.report.written_run import RECIPE, WrittenRun, run_with_faults, step_line


def _append(path: Path, *lines: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join(lines))


def test_everything_that_a_run_wrote(tmp_path: Path) -> None:
    run = read_run(run_with_faults(tmp_path / "run").write(), "run")
    assert run.series["step"].tolist() == [*range(1, 31), *range(32, 41)]
    assert run.series["kl"][9] == step_line(10, 0.5)["kl"]
    assert [event.kind for event in run.events][:5] == [
        "attempt_started",
        "resumed",
        "checkpoint_saved",
        "checkpoint_saved",
        "attempt_failed",
    ]
    assert run.events[4].values == {"rank": 1, "reason": "rank 1 is gone", "exit_code": 3}
    assert run.setting("train.optimizer.beta2") == 0.95, "today's defaults"
    assert run.setting("teacher.path") == "models/teacher-hf"
    assert run.setting("teacher.no_such.key") is None
    assert not run.has("mfu")
    assert run.has("agreement")
    assert run.notes == []


def test_the_divergence_from_truncated_targets_is_no_kl(tmp_path: Path) -> None:
    """An older version called it `kl`; the true one is on diagnosed steps alone."""
    run = WrittenRun(tmp_path / "run")
    run.steps(1, 4)
    for line in run.lines[2:]:
        line["targets_kl"] = line.pop("divergence") - 0.1
    del run.lines[2]["kl"]
    written = [dict(line) for line in run.lines]
    run.write({**RECIPE, "loss": {"targets": {"draws": 8}}})
    series = read_run(run.folder, "run").series
    assert [value for value in series["kl"] if math.isfinite(value)] == [written[3]["kl"]]
    assert series["targets_kl"].tolist() == [
        *(line["kl"] for line in written[:2]),
        *(line["targets_kl"] for line in written[2:]),
    ]


def test_the_load_of_experts_is_read_and_drawn(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.steps(1, 4, experts={"max_load": 1.5, "min_load": 0.25, "entropy": 0.9})
    run.steps(5, 5, experts="none")
    record = read_run(run.write(), "run")
    assert record.series["max_load"].tolist()[:4] == [1.5] * 4
    assert math.isnan(record.series["max_load"][4])
    drawings = {drawing.name: drawing for drawing in curves_over_tokens([record])}
    assert "experts" in drawings
    assert "idle" not in drawings


def test_events_of_a_former_version_are_named_with_their_new_word(tmp_path: Path) -> None:
    folder = run_with_faults(tmp_path / "run").write()
    _append(folder / "events.jsonl", '{"time": 1, "attempt": 1, "event": "hole", "step": 3}')
    assert "events.jsonl: hole is now samples_masked, and left out" in read_run(folder, "run").notes


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = run_with_faults(tmp_path / "run").write()
    _append(
        folder / "metrics.jsonl",
        "{",
        "[1, 2]",
        "null",
        '{"step": 0, "tokens": 1}',
        '{"step": "41", "tokens": 1}',
        '{"tokens": 41}',
        "[" * 100_000,
        '{"step": 1e999, "tokens": 5}',
        '{"step": 41, "tokens": 41984, "lo',
    )
    _append(
        folder / "events.jsonl",
        '{"event": "completed"}',
        '{"time": 1, "event": "no such"}',
        '{"time": -1, "event": "completed"}',
    )
    run = read_run(folder, "run")
    assert len(run) == 39
    assert run.notes == [
        "metrics.jsonl: 8 damaged lines left out",  # the last is being written
        "events.jsonl: 3 lines damaged or unknown, left out",
    ]


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadistill.events.lines.MAX_LINE_BYTES", 1000)
    folder = run_with_faults(tmp_path / "run").write()
    _append(folder / "metrics.jsonl", "9" * 2500, json.dumps(step_line(41, 0.5)), "")
    run = read_run(folder, "run")
    assert run.series["step"][-1] == 41
    assert run.notes == ["metrics.jsonl: 1 damaged line left out"]


def test_of_a_step_that_was_logged_twice_the_later_line_holds(tmp_path: Path) -> None:
    written = WrittenRun(tmp_path / "run")
    written.steps(1, 5)
    written.steps(3, 4, loss=7.0)
    run = read_run(written.write(), "run")
    assert run.series["step"].tolist() == [1, 2, 3, 4, 5]
    assert run.series["loss"][2:4].tolist() == [7.0, 7.0]
    assert "5 of 7 lines kept" in run.notes[0]


def test_what_is_not_a_number_is_no_value(tmp_path: Path) -> None:
    written = WrittenRun(tmp_path / "run")
    for step, value in enumerate((True, "5", None, [1], 10**400, 1e31, math.nan, math.inf, -3), 1):
        written.steps(step, step, loss=value, diagnostics=value)
    run = read_run(written.write(), "run")
    assert [math.isfinite(each) for each in run.series["loss"]] == [False] * 8 + [True]
    assert number(-3) == -3.0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"recipe": 3}', "[" * 200_000, '{"versions": {}}'])
def test_a_recipe_that_cannot_be_read_is_noted(content: str, tmp_path: Path) -> None:
    folder = run_with_faults(tmp_path / "run").write()
    (folder / "recipe.json").write_text(content, encoding="utf-8")
    run = read_run(folder, "run")
    assert run.recipe == {}
    assert "recipe.json" in run.notes[0]


def test_a_recipe_of_another_version_is_left_as_it_is(tmp_path: Path) -> None:
    folder = run_with_faults(tmp_path / "run").write({**RECIPE, "optimizer": "muon"})
    run = read_run(folder, "run")
    assert run.setting("optimizer") == "muon"
    assert "not a recipe of this version" in run.notes[0]


@pytest.mark.parametrize("file", ["recipe.json", "metrics.jsonl", "events.jsonl"])
def test_each_file_alone_is_a_run(file: str, tmp_path: Path) -> None:
    folder = run_with_faults(tmp_path / "run").write()
    for other in {"recipe.json", "metrics.jsonl", "events.jsonl"} - {file}:
        (folder / other).unlink()
    run = read_run(folder, "run")
    assert (bool(run.recipe), len(run) > 0, bool(run.events)) == (
        file == "recipe.json",
        file == "metrics.jsonl",
        file == "events.jsonl",
    )


def test_attempts_in_their_order(tmp_path: Path) -> None:
    folder = run_with_faults(tmp_path / "run").write()
    (folder / "attempts").mkdir()
    for name, content in (("00002", '{"host": "b"}'), ("00001", '{"host": "a"}'), ("00003", "{"), ("x", "{}")):
        (folder / "attempts" / f"{name}.json").write_text(content)
    run = read_run(folder, "run")
    assert [(each["number"], each.get("host")) for each in run.attempts] == [(1, "a"), (2, "b"), (3, None)]
    assert run.notes == ["attempts: 1 of 3 records cannot be read"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="not a run folder"):
        read_runs([tmp_path])


def test_names_are_short_and_differ(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x/run", "a/y/run")]
    for folder in folders:
        run_with_faults(folder).write()
    assert [run.name for run in read_runs(folders)] == ["x/run", "y/run"]
    assert [run.name for run in read_runs(folders[:1])] == ["run"]


def test_long_names_keep_the_part_in_which_they_differ() -> None:
    sweep = [f"sweep-of-learning-rates-with-warmup/{rate}/gemma2-27b-to-2b-forward_kl" for rate in ("1e-3", "3e-4")]
    names = distinct_names(sweep)
    assert [("1e-3" in name, "3e-4" in name, len(name)) for name in names] == [(True, False, 40), (False, True, 40)]
    assert distinct_names(["x" * 50]) == ["…" + "x" * 39]
    assert distinct_names(["short", "names"]) == ["short", "names"]


def test_a_folder_that_is_named_twice_is_one_run(tmp_path: Path) -> None:
    folder = run_with_faults(tmp_path / "run").write()
    assert [run.name for run in read_runs([folder, folder / ".." / "run"])] == ["run"]


def test_text_that_no_page_can_hold() -> None:
    assert printable("a\x00b\x1b[31m\udc80\u202eé") == "a�b�[31m��é"


@pytest.mark.parametrize(("values", "name"), [({"wait_seconds": 0.1}, "wait_seconds"), ({}, "teacher_seconds")])
def test_a_teacher_is_waited_for_as_the_run_measured_it(tmp_path: Path, values: dict[str, float], name: str) -> None:
    """A run of a former version has only the time until the targets were there."""
    written = WrittenRun(tmp_path)
    written.begin()
    written.steps(1, 3, **values)
    record = read_run(written.write(), "run")
    assert record.teacher_wait == name
    assert record.has(record.teacher_wait)
