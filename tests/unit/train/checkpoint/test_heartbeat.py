"""Which attempts count as alive: by their process on this system, by their heartbeat from anywhere else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megadistill.errors import UserError
from megadistill.events import EventLog, JsonLines
from megadistill.train.checkpoint import heartbeat
from megadistill.train.checkpoint.attempt import acquire, attempt_path, launch_record, process_of, this_system
from megadistill.train.checkpoint.heartbeat import HeartbeatThread, refuse_running

pytestmark = pytest.mark.skipif(this_system() is None, reason="processes are looked up in /proc")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes the part of the first rank."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def _record(pid: int) -> dict[str, Any]:
    found = process_of(pid)
    assert found is not None
    return {"host": "n7", "pid": pid, "system": this_system(), "process_started": found.started}


def _elsewhere(folder: Path) -> Path:
    """Attempt 1 of a host that nobody here can ask. Returns its record."""
    acquire(folder, {**_record(os.getpid()), "system": "another boot"})
    return attempt_path(folder, 1)


def test_a_folder_without_attempts_is_free(tmp_path: Path) -> None:
    assert refuse_running(tmp_path) == 0
    assert refuse_running(tmp_path / "none") == 0
    assert not (tmp_path / "none").exists(), "a check writes nothing"


def test_a_run_whose_process_is_here_is_refused_with_what_to_do(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    acquire(tmp_path, _record(process.pid))
    JsonLines(tmp_path / "metrics.jsonl").append({"step": 140})
    with pytest.raises(UserError) as caught:
        refuse_running(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path}: attempt 1 is running on n7 (pid {process.pid}), at step 140, heartbeat" in message
    assert f"`touch {tmp_path / 'STOP'}`" in message
    assert "--take-over" in message
    assert "\n" not in message


@pytest.mark.parametrize("event", ["stopped", "completed"])
def test_a_run_that_ended_is_free_although_its_process_is_still_there(
    event: str, tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    acquire(tmp_path, _record(process.pid))
    EventLog(tmp_path, 2, writes=True).write(event, step=3)
    with pytest.raises(UserError):
        refuse_running(tmp_path)  # of another attempt
    EventLog(tmp_path, 1, writes=True).write(event, step=3)
    assert refuse_running(tmp_path) == 1


def test_a_killed_process_holds_up_nobody(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    """Not even while its parent has not noticed, as just after `kill -9`."""
    acquire(tmp_path, _record(process.pid))
    process.kill()
    _wait_for_state(process.pid, "Z")
    assert refuse_running(tmp_path) == 1
    process.wait()
    assert refuse_running(tmp_path) == 1


def test_a_frozen_process_holds_up_nobody(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    acquire(tmp_path, _record(process.pid))
    process.send_signal(signal.SIGSTOP)
    _wait_for_state(process.pid, "T")
    assert refuse_running(tmp_path) == 1
    process.send_signal(signal.SIGCONT)


def _wait_for_state(pid: int, state: str) -> None:
    end = time.monotonic() + 20
    while (found := process_of(pid)) is not None and found.state != state and time.monotonic() < end:
        time.sleep(0.01)


def test_another_process_with_the_same_id_is_not_the_run(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    record = _record(process.pid)
    acquire(tmp_path, {**record, "process_started": record["process_started"] - 1})
    assert refuse_running(tmp_path) == 1


def test_a_heartbeat_from_elsewhere_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process id of another host may be anybody's here: only the file's time tells."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    path = _elsewhere(tmp_path)
    os.utime(path, (time.time() - 500, time.time() - 500))  # a clock that differs from ours
    thread = HeartbeatThread(tmp_path, 1)
    with pytest.raises(UserError, match="attempt 1 is running on n7"):
        refuse_running(tmp_path)
    thread.close()


def test_a_copy_of_the_folder_of_a_running_run_is_free(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "WATCH_SECONDS", 0.3)
    run, copy = tmp_path / "run", tmp_path / "copy"
    acquire(run, _record(process.pid))
    shutil.copytree(run, copy)
    assert refuse_running(copy) == 1
    with pytest.raises(UserError, match="attempt 1 is running"):
        refuse_running(run)


def test_a_running_run_is_refused_by_each_path_that_its_folder_has(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file system that is mounted twice: the recorded path is none of this start's."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    run = tmp_path / "run"
    acquire(run, _record(process.pid))
    run.rename(tmp_path / "other")
    thread = HeartbeatThread(tmp_path / "other", 1)
    with pytest.raises(UserError, match="attempt 1 is running"):
        refuse_running(tmp_path / "other")
    thread.close()


def test_no_heartbeat_from_elsewhere_holds_up_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "WATCH_SECONDS", 0.3)
    _elsewhere(tmp_path)
    assert refuse_running(tmp_path) == 1


def test_nobody_watches_a_heartbeat_of_hours_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("watched"))
    long_ago = time.time() - 2 * heartbeat.GONE_SECONDS
    os.utime(_elsewhere(tmp_path), (long_ago, long_ago))
    assert refuse_running(tmp_path) == 1


@pytest.mark.parametrize("content", ["", "{", '{"pid": "x", "system": 3}'])
def test_a_record_that_is_cut_short_is_watched_too(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "WATCH_SECONDS", 0.3)
    acquire(tmp_path, {})
    attempt_path(tmp_path, 1).write_text(content)
    assert refuse_running(tmp_path) == 1


def test_what_a_record_holds_is_not_printed_raw(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    acquire(tmp_path, {**_record(process.pid), "host": "n7\x1b[31m\nn8"})
    with pytest.raises(UserError) as caught:
        refuse_running(tmp_path)
    assert str(caught.value).isprintable()


def test_the_record_of_a_launch_identifies_its_process(tmp_path: Path) -> None:
    acquire(tmp_path, launch_record(1))
    assert json.loads(attempt_path(tmp_path, 1).read_text())["pid"] == os.getpid()
    with pytest.raises(UserError):
        refuse_running(tmp_path)


def test_of_two_starts_that_found_the_folder_free_one_gets_it(tmp_path: Path) -> None:
    assert acquire(tmp_path, {}, after=0).number == 1
    free = refuse_running_as_of(tmp_path, 2)
    acquire(tmp_path, {"host": "n8"}, after=free)
    with pytest.raises(UserError, match=r"another start came first, on n8 .*, as attempt 3"):
        acquire(tmp_path, {"host": "n9"}, after=free)
    assert not attempt_path(tmp_path, 4).exists()
    assert acquire(tmp_path, {}).number == 4, "taken over"


def refuse_running_as_of(folder: Path, number: int) -> int:
    """The number that `refuse_running` gives once attempt `number` has ended."""
    while acquire(folder, {}).number < number:
        pass
    EventLog(folder, number, writes=True).write("stopped", step=1)
    return refuse_running(folder)
