"""A new divergence is one entry of `DivergenceKind`, its definition in reference.py, its arithmetic in pointwise.py."""

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.unit.loss.toy_divergence import changed_package


def test_a_toy_divergence_meets_every_guard(tmp_path: Path) -> None:
    """In a process of its own, whose package is a copy with the three changes."""
    changed_package(tmp_path)
    code = (
        "import megadistill, sys; from tests.unit.loss.toy_divergence import meet_every_guard; "
        "assert megadistill.__file__.startswith(sys.argv[1]), megadistill.__file__; meet_every_guard()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| jeffreys 0.2500 | kl 0.5000 |" in done.stdout
