"""The checks of `make gpu`: on a GPU as they are, and on any machine with a CPU in its place."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.checks import CHECKS
from tests.gpu.results import PASSED, Results
from tests.paths import ROOT


def run(out: Path, *arguments: str) -> Results:
    command = [sys.executable, "-m", "tests.gpu", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return Results.load(out / "gpu.json")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; elsewhere: make gpu STAND_IN=1")
@pytest.mark.parametrize("name", [check.name for check in CHECKS])
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, "--only", name).outcomes
    assert outcome.state == PASSED, outcome.reason


@pytest.mark.thorough
def test_a_cpu_in_the_place_of_a_gpu_runs_every_check_to_its_end(tmp_path: Path) -> None:
    """What a first run on a GPU is not to be spent on: names, arguments and shapes that are wrong."""
    outcomes = run(tmp_path, "--stand-in", "--minutes", "60").outcomes
    assert [outcome.name for outcome in outcomes] == [check.name for check in CHECKS]
    assert {outcome.state for outcome in outcomes} == {PASSED}
    page = (tmp_path / "gpu.md").read_text()
    assert "A CPU stood in for the device" in page
    assert all(f"## {check.name}\n" in page for check in CHECKS)
