"""Numbers that do not move: three steps of two runs. A refactoring leaves them alone.

tests/golden/losses.json is renewed with `RENEW_GOLDEN=1 pytest tests/ranks/train/test_golden.py`, together with a
**Numerics** line in the CHANGELOG that says why they moved.
"""

import json
import os

import pytest

from tests.paths import ROOT
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import Case, three_steps

GOLDEN = ROOT / "tests" / "golden" / "losses.json"
NAMES = ("loss", "kl", "student_ce", "grad_norm")

CASES = {
    "distill, untied, 2 ranks, accumulation 2": (2, Case(objective="distill", tied=False, accumulation=2)),
    "labels, tied, 1 rank": (1, Case(objective="labels", tied=True)),
}


def _run_cases() -> dict[str, list[dict[str, float]]]:
    runs = {name: run_ranks(world, three_steps, case)[0].steps for name, (world, case) in CASES.items()}
    return {name: [{key: step[key] for key in NAMES} for step in steps] for name, steps in runs.items()}


def test_losses_and_gradient_norms_are_what_they_were() -> None:
    steps_by_case = _run_cases()
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(steps_by_case, indent=1) + "\n", encoding="utf-8")
        pytest.fail(f"{GOLDEN} was renewed: run again without RENEW_GOLDEN")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert steps_by_case.keys() == golden.keys()
    for name, steps in golden.items():
        assert len(steps_by_case[name]) == len(steps) == 3
        for number, (ours, theirs) in enumerate(zip(steps_by_case[name], steps, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=0.0), f"{name}: step {number}"
