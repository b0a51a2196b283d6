"""A guard against tests that vanish: how many test functions each folder has at least, counted from the source.

Raise a floor when a folder grows; lower one only in the change that removes the tests, with the reason.
"""

import ast
import re
from collections import Counter
from pathlib import Path

from tests.paths import ROOT

FLOORS = {
    "tests/e2e": 54,  # three went to tests/real_models
    "tests/fuzz": 4,
    "tests/gpu": 2,
    "tests/ranks/data": 2,
    "tests/ranks/distributed": 22,
    "tests/ranks/doctor": 5,
    "tests/ranks/evaluate": 2,
    "tests/ranks/export": 2,
    "tests/ranks/loss": 12,
    "tests/ranks/models": 6,
    "tests/ranks/plan": 8,
    "tests/ranks/student": 46,
    "tests/ranks/teacher": 32,
    "tests/ranks/train": 50,
    "tests/real_models": 11,
    "tests/scale": 26,
    "tests/slurm": 16,
    "tests/triton": 3,
    "tests/unit": 150,
    "tests/unit/benchmarks": 46,
    "tests/unit/cli": 8,
    "tests/unit/config": 46,
    "tests/unit/data/prepare": 62,
    "tests/unit/data/prepare/token_formats": 66,
    "tests/unit/data/shards": 68,
    "tests/unit/data/storage": 24,
    "tests/unit/data/stream": 56,
    "tests/unit/data/targets": 23,
    "tests/unit/data/text": 32,
    "tests/unit/data/tokenizers": 46,
    "tests/unit/datagen": 22,
    "tests/unit/distributed": 34,
    "tests/unit/distributed/watchdog": 20,
    "tests/unit/doctor": 34,
    "tests/unit/evaluate": 30,
    "tests/unit/export": 18,
    "tests/unit/gpu": 17,
    "tests/unit/heldout": 3,
    "tests/unit/loss": 70,
    "tests/unit/loss/sparse": 18,
    "tests/unit/models": 125,
    "tests/unit/plan": 39,
    "tests/unit/plan/counts": 42,
    "tests/unit/plan/output": 15,
    "tests/unit/prune": 10,
    "tests/unit/report": 52,
    "tests/unit/report/sections": 13,
    "tests/unit/student": 17,
    "tests/unit/teacher": 38,
    "tests/unit/tracking": 19,
    "tests/unit/train": 20,
    "tests/unit/train/checkpoint": 90,
    "tests/unit/train/hooks": 11,
    "tests/unit/train/resilience": 36,
    "tests/unit/train/setup": 91,
    "tests/unit/train/teacher": 2,
    "tests/unit/train/telemetry": 23,
    "tests/unit/train/validation": 4,
}


def _tests(file: Path) -> set[str]:
    """Names of the test functions; of two with the same name pytest sees one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {name for name in names if name.startswith("test")}


def _by_file() -> dict[Path, set[str]]:
    return {file: _tests(file) for file in sorted((ROOT / "tests").rglob("*.py"))}


def test_each_folder_has_at_least_its_tests() -> None:
    found: Counter[str] = Counter()
    for file, names in _by_file().items():
        found[file.parent.relative_to(ROOT).as_posix()] += len(names)
    fewer = {folder: f"{found[folder]} of {floor}" for folder, floor in FLOORS.items() if found[folder] < floor}
    assert not fewer, f"tests vanished: {fewer}"
    unguarded = {folder: count for folder, count in found.items() if count and folder not in FLOORS}
    assert not unguarded, f"folders without a floor: {unguarded}"


def test_pytest_looks_into_every_file_with_tests() -> None:
    hidden = [file for file, names in _by_file().items() if names and not file.name.startswith("test_")]
    assert not hidden, f"pytest collects test_*.py alone: {hidden}"


def test_what_make_test_leaves_out_is_run_by_make_test_all() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    left_out = set(re.findall(r"--ignore (tests/\w+)", makefile))
    assert left_out == {"tests/slurm", "tests/real_models", "tests/triton"}
    for folder in left_out:
        assert re.search(rf"-m pytest {folder} -rs$", makefile, re.MULTILINE), folder
    assert "-m 'not thorough'" in makefile
    assert "-m pytest tests/e2e tests/gpu -m thorough" in makefile
    assert "-m pytest tests/unit tests/ranks tests/scale -m thorough" in makefile
    assert "--jobs 2 --output-sync=line test-slurm test-long" in makefile
