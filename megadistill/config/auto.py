"""The value that `auto` of a recipe takes on a device, and why: log, `doctor` and `plan` show the same words."""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from megadistill.units import listed

BY_THE_RECIPE = "by the recipe"
"""The reason of a value that is not `auto`."""


class Choice(NamedTuple):
    """A value in force, and why it is."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


NO_TRITON = "no package triton is installed"


def missing_for_triton() -> str | None:
    """The thing that Triton lacks here to make kernels, whose launchers it builds with a C compiler; None: nothing."""
    if find_spec("triton") is None:
        return NO_TRITON
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and {' or '.join(compilers)} is not on the PATH"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own, without headers; as Triton does
    if not (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").exists():
        return "Triton needs Python.h, which this Python lacks"
    return None


def install_for_triton(missing: str) -> str:
    """The way out where something is missing, in the words of `missing_for_triton`."""
    if missing == NO_TRITON:
        return "install the one of this build of torch (pip install triton, for NVIDIA)"
    if "compiler" in missing:
        return "install gcc, or name a compiler in the environment variable CC"
    return "install the headers of this Python (python3-dev)"


def has_triton() -> bool:
    """Whether `torch.compile` can make kernels for an accelerator: see `missing_for_triton`."""
    return missing_for_triton() is None


def choose_compile(setting: bool | Literal["auto"], *, accelerator: bool, triton: bool | None = None) -> Choice:
    """`compiled` or `eager`, of layers or of the loss's arithmetic.

    auto: compiled on an accelerator with Triton, eager elsewhere; on a CPU compiling takes about a minute of C++.
    `triton`: whether it is installed; None: look for it here.
    """
    if setting != "auto":
        return Choice("compiled" if setting else "eager", BY_THE_RECIPE)
    if not accelerator:
        return Choice("eager", "a CPU, where compiling takes a minute of C++")
    if has_triton() if triton is None else triton:
        return Choice("compiled", "Triton")
    return Choice("eager", missing_for_triton() or NO_TRITON)


def describe_choices(choices: Mapping[str, Choice]) -> str:
    """A line: the recipe's keys of each choice, the value that they have, and why."""
    keys: dict[Choice, list[str]] = {}
    for key, choice in choices.items():
        keys.setdefault(choice, []).append(key)
    return "; ".join(f"{listed(names)} {choice}" for choice, names in keys.items())
