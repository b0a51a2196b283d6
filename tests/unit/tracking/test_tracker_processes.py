"""The process beside a run: a tracker that raises or blocks, anywhere, is reported, and ended with the run."""

import json
import logging
import time
from pathlib import Path

import pytest

from megadistill.tracking import process as processes_of
from megadistill.tracking.process import TrackerProcesses
from tests.paths import ROOT
from tests.unit.report.written_run import WrittenRun

KEY = "a-key-that-nobody-may-see"


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three steps, and a stand-in for wandb on the path of its processes."""
    (tmp_path / "packages").mkdir()
    source = Path(__file__).with_name("fake_wandb.py").read_text(encoding="utf-8")
    (tmp_path / "packages" / "wandb.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}:{ROOT}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    run = WrittenRun(tmp_path / "run")
    run.steps(1, 3)
    return run.write()


def _logged(folder: Path) -> list[int]:
    path = folder.parent / "logged.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def _await(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} was not reached"
        time.sleep(0.05)


def _texts(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "".join(path.read_text(encoding="utf-8") for path in files)


def test_the_process_sends_what_is_there_and_ends_with_the_run(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_WANDB", "works")
    processes = TrackerProcesses(run_folder, ["wandb"])
    processes.close(seconds=60)
    assert _logged(run_folder) == [1, 2, 3]
    assert (run_folder.parent / "finish").exists()
    assert KEY not in _texts(run_folder) + "".join(capfd.readouterr())
    assert json.loads((run_folder / "tracking" / "wandb.json").read_text(encoding="utf-8"))["step"] == 3


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_tracker_that_blocks_is_ended_with_the_run(
    run_folder: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_WANDB", f"blocks in {place}")
    processes = TrackerProcesses(run_folder, ["wandb"])
    process = processes._processes["wandb"]
    if place == "finish":
        processes.release()
    _await(run_folder.parent / place)
    with caplog.at_level(logging.WARNING):
        processes.close(seconds=0.2)
    assert process.returncode == -9
    assert f"`megadistill track {run_folder} --to wandb --once` sends the rest" in caplog.text
    assert f"`wandb sync {run_folder}/tracking/wandb/run-*`" in caplog.text


def test_a_tracker_that_blocks_does_not_outlive_a_run_that_was_killed(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB", "blocks in init")
    monkeypatch.setattr(processes_of, "LAST_SECONDS", 0.1)
    processes = TrackerProcesses(run_folder, ["wandb"])
    _await(run_folder.parent / "init")
    processes.release()  # as the system closes the pipe of a process that is gone
    assert processes._processes["wandb"].wait(timeout=60) == -9


@pytest.mark.parametrize("place", ["init", "log"])
def test_a_tracker_that_raises_is_reported_without_its_key(
    run_folder: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_WANDB", f"raises in {place}")
    processes = TrackerProcesses(run_folder, ["wandb"])
    with caplog.at_level(logging.WARNING):
        processes.close(seconds=60)
    out, err = capfd.readouterr()
    assert f"tracker wandb: RuntimeError: no {place} with the key ***" in err
    assert "has not got everything" in caplog.text
    assert KEY not in out + err + caplog.text + _texts(run_folder)
    assert _logged(run_folder) == []
