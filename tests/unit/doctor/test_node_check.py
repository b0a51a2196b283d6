"""Checks of a node by itself: the disk of the run folder, processes of earlier runs."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.cli.main import run_command
from megadistill.distributed.launch import Launch
from megadistill.doctor import node_check
from megadistill.doctor.node_check import (
    _soft_limit_of,
    check_host_limits,
    check_node,
    free_space,
    left_of_earlier_runs,
    other_runs,
    written_and_read,
)
from megadistill.doctor.rank_report import CheckResult, RankReport, Status
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
        ("environment", "ok"),
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


def _limits(
    monkeypatch: pytest.MonkeyPatch, *, limit: int = 1 << 20, backlog: int = 4096, rank: int = 0, world: int = 4096
) -> dict[str, CheckResult]:
    monkeypatch.setattr(node_check, "raise_open_files", lambda: limit)
    monkeypatch.setattr(node_check, "_listen_backlog", lambda: backlog)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    own = RankReport(rank, "a")
    check_host_limits(own, Launch(rank, world, rank % 8, 8))
    return {each.check: each for each in own.results}


def test_the_node_of_the_store_holds_the_connections_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    results = _limits(monkeypatch)
    assert [(name, each.status) for name, each in results.items()] == [("open files", Status.OK)]
    assert "9,216, as 4,096 ranks need" in results["open files"].detail
    assert _limits(monkeypatch, limit=resource.RLIM_INFINITY)["open files"].status is Status.OK
    assert _limits(monkeypatch, limit=1024, rank=8) == {}, "another node has no store"
    refused = _limits(monkeypatch, limit=4096)["open files"]
    assert refused.status is Status.FAIL
    assert "the hard limit on open files is 4,096, and 4,096 ranks need 9,216: raise it" in refused.detail
    assert _limits(monkeypatch, limit=1024, world=8)["open files"].status is Status.OK


def test_more_ranks_than_may_connect_at_once_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    warned = _limits(monkeypatch, backlog=128)["connections"]
    assert warned.status is Status.WARN
    assert "net.core.somaxconn is 128, and 4,096 ranks connect" in warned.detail
    assert "connections" not in _limits(monkeypatch, backlog=128, world=128)


def test_torchrun_keeps_the_store_under_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check, "_soft_limit_of", lambda process: 1024)
    monkeypatch.setattr(node_check, "raise_open_files", lambda: 1 << 20)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    own = RankReport(0, "a")
    check_host_limits(own, Launch(0, 1024, 0, 8))
    (row,) = [each for each in own.results if each.check == "open files"]
    assert row.status is Status.FAIL
    assert "torchrun, which has the store, is 1,024, and 1,024 ranks need 2,688: `ulimit -n 65536` before" in row.detail


def test_the_limit_of_another_process() -> None:
    assert _soft_limit_of(os.getpid()) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert _soft_limit_of(2**22 + 1) is None
