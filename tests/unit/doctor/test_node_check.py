"""Checks of a node by itself: the disk of the run folder, processes of earlier runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.cli.main import run_command
from megadistill.doctor import node_check
from megadistill.doctor.node_check import check_node, free_space, left_of_earlier_runs, other_runs, written_and_read
from megadistill.doctor.rank_report import RankReport, Status
from tests.paths import RECIPES


def test_the_run_folder_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    assert written_and_read(tmp_path / "new" / "run") > 0
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").write_text("x")
    written_and_read(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_a_disk_that_refuses_or_forgets_is_a_matter_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    own = RankReport(0, "a")
    check_node(own, tmp_path / "file" / "run")
    results = {each.check: each for each in own.results}
    assert (results["run folder"].status, results["run folder"].of_node) == (Status.FAIL, True)
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"zeros")
    own = RankReport(0, "a")
    check_node(own, tmp_path)
    results = {each.check: each for each in own.results}
    assert "another content" in results["run folder"].detail
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_first_process_of_an_earlier_attempt_that_still_runs_is_named(tmp_path: Path) -> None:
    """A process that waits, whose command line is that of a training run."""
    waits = [sys.executable, "-c", "input(chr(10))", "megadistill", "train"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            process.stdout.read(1)  # it has its command line
            (tmp_path / "attempts").mkdir()
            for number, (host, pid) in enumerate(
                [(socket.gethostname(), process.pid), ("elsewhere", process.pid), (socket.gethostname(), os.getpid())],
                1,
            ):
                record = {"host": host, "pid": pid}
                (tmp_path / "attempts" / f"{number:05d}.json").write_text(json.dumps(record))
            (tmp_path / "attempts" / "00004.json").write_text("{")
            (line,) = left_of_earlier_runs(tmp_path)
            assert f"process {process.pid} of attempt 00001" in line
            assert process.pid in other_runs()
        finally:
            assert process.stdin is not None
            process.stdin.close()
    assert left_of_earlier_runs(tmp_path) == []


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert free_space(tmp_path / "a" / "b") > 0


def test_the_command_examines_a_node_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(node_check, "other_runs", lambda: [])
    node = ["doctor", str(RECIPES / "smoke.yaml"), "--node", "--set", f"run.folder={tmp_path / 'run'}"]
    assert run_command([*node, "--json", str(tmp_path / "node.json")]) == 0
    values = json.loads((tmp_path / "node.json").read_text())
    assert [(row["check"], row["status"]) for row in values["rows"]] == [
        ("recipe", "ok"),
        ("device", "ok"),
        ("JIT locks", "ok"),
        ("run folder", "ok"),
        ("earlier runs", "ok"),
    ]
    assert "bad nodes" not in capsys.readouterr().out
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (0, 0))
    assert run_command([*node, "--set", "train.steps=0"]) == 2
    out = capsys.readouterr().out
    assert "train.steps" in out
    assert "deepspeed_shm_comm" in out
    assert out.rstrip().endswith(f"bad nodes: {socket.gethostname()}")
