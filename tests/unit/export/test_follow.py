"""The follower of a run: a row for each checkpoint, resumed, in nobody's way."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.load import validate_recorded
from megadistill.errors import UserError
from megadistill.evaluate.checkpoint_scores import read_scores
from megadistill.evaluate.lm_eval import Score, TaskScores
from megadistill.export import export_run, pinned
from megadistill.export import follow as follower
from megadistill.export.follow import Measurements, follow
from megadistill.models.families import load_config
from megadistill.models.sampling import Sampling
from megadistill.train.checkpoint.rollback import Rollback, record_rollbacks
from megadistill.train.checkpoint.writer import remove
from tests.unit.evaluate.test_lm_eval import tasks  # noqa: F401
from tests.unit.export import test_export_run
from tests.unit.export.test_export_run import _checkpoint, _run

IDS = 280
CPU = torch.device("cpu")
TASKS = Measurements(tasks=("own",), limit=3)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model has a row for each id of its tokenizer."""
    monkeypatch.setattr(test_export_run, "VOCAB", IDS)
    monkeypatch.setattr(test_export_run, "PADDED", 512)
    folder, made = _run(tmp_path)
    for step in (2, 4):
        _checkpoint(folder, made, step=step, seed=step)
    return folder


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A harness whose score is the first weight of the exported model; the folders that it measured."""
    measured: list[Path] = []

    def run_tasks(folder: Path, names: Any, **options: Any) -> TaskScores:
        load_config(folder, what="test")
        assert (folder / "tokenizer.json").is_file()
        measured.append(folder)
        return TaskScores("m", "0.4.13", (Score("own", "acc", 0.25 * len(measured), None, 3, 0),))

    monkeypatch.setattr(follower, "check_tasks", lambda *_, **__: None)
    monkeypatch.setattr(follower, "run_tasks", run_tasks)
    return measured


def _once(run: Path, what: Measurements = TASKS) -> int:
    return follow(run, what, once=True, device=CPU)


def _steps(run: Path) -> list[int]:
    return [row.step for row in read_scores(run)]


def _inside(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "follow").iterdir() if path.name != pinned.LOCK)


def _content(run: Path) -> dict[str, bytes]:
    """All files of a run but the follower's."""
    files = (path for path in run.rglob("*") if path.is_file() and "follow" not in path.relative_to(run).parts)
    return {str(path): path.read_bytes() for path in files}


def test_each_checkpoint_gets_a_row_once_and_nothing_of_the_run_changes(run: Path, harness: list[Path]) -> None:
    before = _content(run)
    assert _once(run) == 2
    assert _steps(run) == [2, 4]
    (score,) = read_scores(run)[1].scores
    assert (score.task, score.metric, score.value, score.samples) == ("own", "acc", 0.5, 3)
    assert _once(run) == 0
    assert len(harness) == 2
    assert _once(run, Measurements(tasks=("own",), limit=4)) == 2, "other settings, other numbers"
    assert _content(run) == before
    assert _inside(run) == ["follow.jsonl"], "no export and no pin is left"


def test_a_run_may_delete_a_checkpoint_while_it_is_measured(
    run: Path, harness: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_run.export_checkpoint

    def deleted_meanwhile(*arguments: Any, **options: Any) -> None:
        for path in (run / "checkpoints").iterdir():
            remove(path)
        export(*arguments, **options)

    monkeypatch.setattr(follower, "export_checkpoint", deleted_meanwhile)
    assert _once(run) == 1
    assert _steps(run) == [2]


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_gone_before_it_is_read_is_left_out(
    links: bool, run: Path, harness: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`links`: whether the file system has hard links."""
    link = pinned._link_files

    def too_late(folder: Path, target: Path) -> None:
        if folder.name == "step-00000002":
            remove(folder)
        if not links:
            raise PermissionError(1, "Operation not permitted")
        link(folder, target)

    monkeypatch.setattr(pinned, "_link_files", too_late)
    assert _once(run) == 1
    assert _steps(run) == [4]
    assert "left out" in caplog.text
    assert "step-00000002: the run deleted it before it was read" in caplog.text


def test_damaged_and_abandoned_checkpoints_have_no_row(
    run: Path, harness: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = run / "checkpoints" / "step-00000002" / "rank-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    record_rollbacks(run, [Rollback(at_step=5, to_step=3, skipped_slots=(30, 50), reason="a spike")])
    assert _once(run) == 0
    assert "left out" in caplog.text
    assert "damaged" in caplog.text


def test_it_waits_for_checkpoints_and_ends_with_the_run(run: Path, harness: list[Path]) -> None:
    events = run / "events.jsonl"
    made = validate_recorded(json.loads((run / "recipe.json").read_text())["recipe"], source="test")
    waited: list[Callable[[], object]] = [
        lambda: _checkpoint(run, made, step=6, seed=6),
        lambda: events.write_text(_event("completed")),
    ]

    def wait(seconds: float) -> None:
        waited.pop(0)()

    events.write_text(_event("completed") + _event("attempt_started"))  # a run that was made longer
    assert follow(run, TASKS, once=False, device=CPU, wait=wait) == 3
    assert _steps(run) == [2, 4, 6]
    assert not waited


def test_a_run_that_validation_has_ended_is_over(run: Path, harness: list[Path]) -> None:
    def wait(seconds: float) -> None:
        pytest.fail("the run takes no more steps")

    (run / "events.jsonl").write_text(_event("attempt_started") + _event("stopped", reason="validation.stop"))
    assert follow(run, TASKS, once=False, device=CPU, wait=wait) == 2


def _event(name: str, **values: str) -> str:
    return json.dumps({"time": 1.0, "attempt": 1, "event": name, "step": 6, **values}) + "\n"


def test_samples_and_kept_exports(run: Path) -> None:
    what = Measurements(prompts=("the text",), sampling=Sampling(4, temperature=0.0), keep_exports=True)
    assert _once(run, what) == 2
    first, second = (row.samples[0] for row in read_scores(run))
    assert first.prompt == second.prompt == "the text"
    assert first.text != second.text
    assert sorted(path.name for path in (run / "follow" / "exports").iterdir()) == ["step-00000002", "step-00000004"]
    assert load_config(run / "follow" / "exports" / "step-00000004", what="test").vocab_size == IDS


def test_two_followers_do_not_meet_and_a_killed_ones_leftovers_go(run: Path, harness: list[Path]) -> None:
    left = run / "follow" / ".pinned-abc" / "step-00000002"
    left.mkdir(parents=True)
    (run / "follow" / "follow.jsonl").write_text('{"step": 2, "tok')  # its last line
    assert _once(run) == 2
    assert _steps(run) == [2, 4]
    assert not left.exists()
    with pinned.sole_writer(run / "follow", "megadistill follow"), pytest.raises(UserError, match="another `megadist"):
        _once(run)


def test_what_cannot_be_followed_is_refused_in_a_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to do with a checkpoint: give --tasks"):
        _once(run, Measurements())
    with pytest.raises(UserError, match="not a run folder"):
        _once(tmp_path, Measurements(prompts=("a",)))
    for prompts, tokens in ((("a",), 513), (("a",) * 33, 1), (("a" * 20_000,) * 2, 1)):
        with pytest.raises(UserError, match="a row holds at most 32, 32,768 and 512"):
            _once(run, Measurements(prompts=prompts, sampling=Sampling(tokens)))
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(UserError, match="pip install"):
            _once(run)
    assert not (run / "follow").exists()
    (run / "follow").mkdir()
    (tmp_path / "notes").write_text("of a person\n", encoding="utf-8")
    (run / "follow" / "follow.jsonl").symlink_to(tmp_path / "notes")
    with pytest.raises(UserError, match="is a link"):
        _once(run, Measurements(prompts=("a",)))
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "of a person\n"


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'megadistill[lm-eval]'",
)
def test_the_harness_itself_measures_each_checkpoint(
    run: Path,
    tasks: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(importlib.import_module("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert _once(run, Measurements(tasks=("own_text",), include=tasks, batch=2)) == 2
    first, second = ({score.metric: score.value for score in row.scores} for row in read_scores(run))
    assert first["bits_per_byte"] != second["bits_per_byte"]
    assert read_scores(run)[0].harness == "0.4.13"
