"""A rank whose launcher is killed ends; one that a shell started does not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

RANK = """
import os, signal, sys, time
from megadistill.distributed.watchdog import parent
parent.POLL_SECONDS = 0.05
if sys.argv[1] == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
parent.terminate_with_parent(0.3)
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
print("ended by itself", flush=True)
"""
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:])
child.wait()
"""


def _starts(*chain: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """The first of a chain of processes, each of which starts the next and waits for it."""
    command = [part for each in chain for part in each]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": ROOT}
    started: subprocess.Popen[str] = subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def _scripts(tmp_path: Path) -> tuple[Path, Path]:
    launcher, rank = tmp_path / "deepspeed", tmp_path / "rank.py"
    launcher.write_text(LAUNCHER)
    rank.write_text(RANK)
    return launcher, rank


def _launched(**values: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return {**environment, "PYTHONPATH": str(ROOT), **values}


def _output_after_kill(process: subprocess.Popen[str]) -> str:
    """The output of the rank from the kill to its end: it holds the other end of the pipe."""
    process.send_signal(signal.SIGKILL)
    assert process.stdout is not None
    output = process.stdout.read()
    process.wait()
    process.stdout.close()
    return output


@pytest.mark.parametrize("sigterm", ["obeys", "ignores"])
def test_a_rank_ends_with_its_launcher(sigterm: str, tmp_path: Path) -> None:
    launcher, rank = _scripts(tmp_path)
    chain = [sys.executable, str(launcher)], [sys.executable, str(rank), sigterm, "60"]
    output = _output_after_kill(_starts(*chain, environment=_launched(RANK="3")))
    assert output.startswith("megadistill: rank 3: its launcher is gone: stopping\n")
    assert ("still running 0 s after its launcher was gone: exiting without a checkpoint" in output) == (
        sigterm == "ignores"
    )
    assert "ended by itself" not in output


def test_a_rank_ends_with_the_runner_of_deepspeed(tmp_path: Path) -> None:
    """Which leaves its launch.py, the rank's own parent, at work."""
    launcher, rank = _scripts(tmp_path)
    launch = [sys.executable, str(launcher)]
    middle = [sys.executable, "-c", LAUNCHER.replace("argv[1:]", "argv[2:]"), "deepspeed.launcher.launch"]
    chain = launch, middle, [sys.executable, str(rank), "obeys", "60"]
    output = _output_after_kill(_starts(*chain, environment=_launched(RANK="0")))
    assert output == "megadistill: rank 0: its launcher is gone: stopping\n"


def test_what_no_launcher_started_outlives_its_parent(tmp_path: Path) -> None:
    launcher, rank = _scripts(tmp_path)
    chain = [sys.executable, str(launcher)], [sys.executable, str(rank), "obeys", "0.5"]
    output = _output_after_kill(_starts(*chain, environment=_launched()))
    assert output == "ended by itself\n"
