"""The ranges of pyproject.toml are what was tried: tests/versions has both ends, constraints.txt lies between."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megadistill.train.checkpoint.versions import tried, untried
from tests.paths import ROOT

RANGES = {"torch": SpecifierSet(">=2.11.0a0,<2.16"), "python": SpecifierSet(">=3.11,<3.14")}


def _pins(path: Path) -> dict[str, Version]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): Version(number) for name, number in pairs}


def _ranges() -> dict[str, SpecifierSet]:
    """Of the package and of the extras that `make test-versions` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["parquet"], *extras["remote"], *extras["test"]]
    needed = [Requirement(line) for line in lines]
    return {each.name.lower().replace("_", "-"): each.specifier for each in needed if each.name != "megadistill"}


def _end(specifier: SpecifierSet, operator: str) -> Version:
    return next(Version(each.version) for each in specifier if each.operator == operator)


@pytest.mark.parametrize("name", sorted(_ranges()))
def test_a_range_begins_and_ends_with_what_was_tried(name: str) -> None:
    specifier = _ranges()[name]
    lowest, newest = (_pins(ROOT / "tests" / "versions" / f"{end}.txt")[name] for end in ("lowest", "newest"))
    assert lowest == Version(_end(specifier, ">=").base_version)
    assert specifier.contains(newest)
    assert lowest <= newest
    assert specifier.contains(_pins(ROOT / "constraints.txt")[name])


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        ({"torch": "2.13.0+cpu"}, []),
        ({"torch": "2.11.0a0+5c2d1b0.nv26.02"}, []),
        ({"torch": "2.10.1"}, ["torch 2.10.1 was not tried (<2.16,>=2.11.0a0)"]),
        ({"torch": "2.16.0.dev20261201+cu132"}, ["torch 2.16.0.dev20261201+cu132 was not tried (<2.16,>=2.11.0a0)"]),
        ({"python": "3.14.0", "cuda": "13.0"}, ["python 3.14.0 was not tried (<3.14,>=3.11)"]),
    ],
)
def test_a_version_outside_of_its_range_is_named(found: dict[str, str], lines: list[str]) -> None:
    assert untried(found, RANGES) == lines


def test_what_was_tried_is_what_pip_is_told() -> None:
    ranges = tried()
    assert {"python", "torch", "transformers", "deepspeed", "numpy"} <= ranges.keys()
    assert not {"pyarrow", "ruff"} & ranges.keys(), "an extra's"
