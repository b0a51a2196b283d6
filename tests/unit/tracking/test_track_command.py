"""`megadistill track`: sends a run folder, resumes, and refuses what it cannot send."""

import json
import sys
import time
from pathlib import Path

import pytest

from megadistill.cli.main import run_command
from megadistill.io import locked_folder
from tests.unit.report.written_run import WrittenRun


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps that is not done, beside a stand-in for wandb."""
    source = Path(__file__).with_name("fake_wandb.py").read_text(encoding="utf-8")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(source, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("FAKE_WANDB", "works")
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "a-key")
    run = WrittenRun(tmp_path / "run")
    run.steps(1, 2)
    return run.write()


def test_what_is_there_is_sent_once(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run_command(["track", str(run_folder), "--to", "wandb", "--once"]) == 0
    lines = (run_folder.parent / "logged.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("2 lines sent to wandb, up to step 2 (run ")
    assert second.startswith("0 lines sent to wandb, up to step 2 (run ")


def test_a_run_that_is_done_ends_the_command(run_folder: Path) -> None:
    (run_folder / "DONE").touch()
    assert run_command(["track", str(run_folder), "--to", "wandb"]) == 0
    assert (run_folder.parent / "finish").exists()


def test_an_interrupt_waits_until_everything_is_sent(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        if seconds > 0:
            assert not (run_folder.parent / "finish").exists()
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    assert run_command(["track", str(run_folder), "--to", "wandb"]) == 3
    assert (run_folder.parent / "logged.jsonl").read_text(encoding="utf-8").count("\n") == 2
    assert (run_folder.parent / "finish").exists()


def test_a_tracker_that_fails_is_exit_code_3(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WANDB", "raises in init")
    assert run_command(["track", str(run_folder), "--to", "wandb", "--once"]) == 3


def test_refusals(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert run_command(["track", *arguments]) == 2
        return capsys.readouterr().err

    assert "is no run folder" in refused(str(tmp_path), "--to", "wandb")
    assert "did you mean 'wandb'" in refused(str(run_folder), "--to", "wanb")
    with locked_folder(run_folder / "tracking" / "wandb.lock"):
        assert "by another process on this machine" in refused(str(run_folder), "--to", "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'megadistill[mlflow]'" in refused(str(run_folder), "--to", "mlflow")
