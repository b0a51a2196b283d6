"""What the next start of a run does, told from its folder alone: nothing, or resume."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.recipe import Recipe
from megadistill.events import JsonLines
from megadistill.train.checkpoint.folders import checkpoint_name
from megadistill.train.setup.next_start import how_to_resume, nothing_to_do
from megadistill.train.setup.run_folder import write_description
from tests.unit.train.cases import recipe

STEPS = 8


def _recipe(folder: Path, **sections: Any) -> Recipe:
    return recipe(Path("data/manifest.json"), folder, **{"train": {"steps": STEPS}, **sections})


def _save(folder: Path, step: int) -> Path:
    """A checkpoint by its manifest and sizes."""
    checkpoint = folder / "checkpoints" / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank-00000-of-00001.safetensors").write_bytes(bytes(64))
    files = {"rank-00000-of-00001.safetensors": {"bytes": 64, "sha256": "0" * 64}}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    return checkpoint


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_description(folder, _recipe(folder).snapshot(), {})
    _save(folder, 4)
    _save(folder, STEPS)
    (folder / "DONE").write_text(f"{STEPS}\n")
    return folder


def test_a_finished_run_has_nothing_to_do(finished: Path) -> None:
    answer = nothing_to_do(_recipe(finished), stop_after=None)
    assert answer is not None
    assert answer.line.startswith(f"done, step {STEPS} of {STEPS}: nothing to do")
    assert f"`megadistill export {finished} --output DIR`" in answer.line
    assert "train.steps" in answer.line
    assert "\n" not in answer.line
    assert not answer.recipe_differs


def test_a_longer_one_has(finished: Path) -> None:
    assert nothing_to_do(_recipe(finished, train={"steps": STEPS + 1}), stop_after=None) is None


def test_a_last_step_without_its_end_is_not_finished(finished: Path) -> None:
    """A kill between the last checkpoint and DONE: what the end does is still to do."""
    (finished / "DONE").unlink()
    assert nothing_to_do(_recipe(finished), stop_after=None) is None


@pytest.mark.parametrize("damage", ["no manifest", "no file", "short"])
def test_a_finished_run_whose_checkpoint_is_damaged_is_repaired(finished: Path, damage: str) -> None:
    checkpoint = finished / "checkpoints" / checkpoint_name(STEPS)
    file = checkpoint / "rank-00000-of-00001.safetensors"
    if damage == "no manifest":
        (checkpoint / "manifest.json").unlink()
    elif damage == "no file":
        file.unlink()
    else:
        file.write_bytes(bytes(63))
    assert nothing_to_do(_recipe(finished), stop_after=None) is None


def test_other_data_and_a_finished_run_are_not_passed_over(finished: Path) -> None:
    answer = nothing_to_do(_recipe(finished, data={"manifest": "mine/manifest.json"}), stop_after=None)
    assert answer is not None
    assert answer.recipe_differs
    assert "although data.manifest was 'data/manifest.json', is 'mine/manifest.json'" in answer.line
    assert "name another run.folder" in answer.line


def test_a_moved_folder_is_the_same_run(finished: Path, tmp_path: Path) -> None:
    moved = finished.rename(tmp_path / "moved")
    answer = nothing_to_do(_recipe(moved), stop_after=None)
    assert answer is not None
    assert not answer.recipe_differs


@pytest.mark.parametrize(
    ("events", "diverged"), [(["student_diverged"], True), (["student_diverged", "rollback"], False)]
)
def test_a_finished_run_whose_student_diverged_is_not_to_be_exported(
    finished: Path, events: list[str], diverged: bool
) -> None:
    for event in events:
        JsonLines(finished / "events.jsonl").append({"time": 1.0, "event": event, "attempt": 1, "step": 3})
    answer = nothing_to_do(_recipe(finished), stop_after=None)
    assert answer is not None
    assert ("the student diverged" in answer.line) == diverged
    assert ("megadistill export" in answer.line) != diverged


def test_how_data_is_read_is_no_other_data(finished: Path) -> None:
    answer = nothing_to_do(_recipe(finished, data={"prefetch": 9}), stop_after=None)
    assert answer is not None
    assert "to train longer" in answer.line


@pytest.mark.parametrize(("stop_after", "what"), [(7, "past --stop-after 7"), (8, "where --stop-after stops it")])
def test_a_stop_behind_the_run_takes_no_step(finished: Path, stop_after: int, what: str) -> None:
    (finished / "DONE").unlink()
    longer = _recipe(finished, train={"steps": 100})
    answer = nothing_to_do(longer, stop_after=stop_after)
    assert answer is not None
    assert answer.line == f"already at step {STEPS}, {what}; rerun without it to continue"
    assert nothing_to_do(longer, stop_after=STEPS + 1) is None


def test_a_new_run_has_everything_to_do(tmp_path: Path) -> None:
    assert nothing_to_do(_recipe(tmp_path / "none"), stop_after=1) is None


def test_what_resumes_a_run_names_its_step_and_its_checkpoint(finished: Path) -> None:
    assert how_to_resume(finished, "megadistill train r.yaml") == (
        f"{finished}: ended before its first step; `megadistill train r.yaml` resumes from the checkpoint of step "
        f"{STEPS}"
    )
    JsonLines(finished / "metrics.jsonl").append({"step": 11})
    assert how_to_resume(finished, after_fault=True) == (
        f"{finished}: ended after step 11; once the cause is mended, the same command resumes from the checkpoint of "
        f"step {STEPS}"
    )
    assert how_to_resume(finished / "none").endswith("the same command starts from the beginning")


def test_the_answer_costs_no_import_of_torch() -> None:
    modules = "megadistill.cli.train, megadistill.config.load, megadistill.train.checkpoint.heartbeat"
    code = f"import sys, {modules}, megadistill.train.setup.next_start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
