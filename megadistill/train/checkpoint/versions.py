"""Versions of the packages that decide a run's numbers."""

import platform
from collections.abc import Mapping
from importlib.metadata import metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PACKAGES = ("megadistill", "torch", "deepspeed", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Version by package name, and by `python`."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def tried() -> dict[str, SpecifierSet]:
    """The range of versions that this package was tried with, by package name, and by `python`: pip's constraints."""
    needed = [Requirement(line) for line in requires("megadistill") or []]
    ranges = {each.name: each.specifier for each in needed if each.marker is None}  # the marker of an extra
    return {"python": SpecifierSet(metadata("megadistill")["Requires-Python"]), **ranges}


def untried(installed: Mapping[str, str], ranges: Mapping[str, SpecifierSet]) -> list[str]:
    """A line for each version of `installed` outside of its range.

    A container's own build, as in 2.11.0a0+5c2d1b0.nv26.02, is tried where its range has it.
    """
    return [
        f"{name} {number} was not tried ({ranges[name]})"
        for name, number in installed.items()
        if name in ranges and not ranges[name].contains(number, prereleases=True)
    ]
