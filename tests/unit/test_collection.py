"""A guard against tests that vanish: how many test functions each folder has at least, counted from the source.

Raise a floor when a folder grows; lower one only in the change that removes the tests, with the reason.
"""

import ast
from collections import Counter
from pathlib import Path

from tests.paths import ROOT

FLOORS = {
    "tests/e2e": 43,
    "tests/ranks": 113,
    "tests/slurm": 16,
    "tests/unit": 93,
    "tests/unit/student": 6,
    "tests/unit/benchmarks": 30,
    "tests/unit/comm": 34,
    "tests/unit/data": 222,
    "tests/unit/doctor": 27,
    "tests/unit/export": 14,
    "tests/unit/loss": 75,
    "tests/unit/model": 67,
    "tests/unit/plan": 93,
    "tests/unit/report": 74,
    "tests/unit/teacher": 34,
    "tests/unit/train": 161,
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
