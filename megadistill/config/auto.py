"""The value that `auto` of a recipe takes on a device, and why: log, `doctor` and `plan` show the same words."""

from importlib.util import find_spec
from typing import Literal, NamedTuple


class Choice(NamedTuple):
    """A value in force, and why it is."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def has_triton() -> bool:
    """Whether `torch.compile` can make kernels for an accelerator: the package is installed."""
    return find_spec("triton") is not None


def choose_compile(setting: bool | Literal["auto"], *, accelerator: bool, triton: bool | None = None) -> Choice:
    """`compiled` or `eager`, of layers or of the loss's arithmetic.

    auto: compiled on an accelerator with Triton, eager elsewhere; on a CPU compiling takes about a minute of C++.
    `triton`: whether it is installed; None: look for it here.
    """
    if setting != "auto":
        return Choice("compiled" if setting else "eager", "by the recipe")
    if not accelerator:
        return Choice("eager", "a CPU, where compiling takes a minute of C++")
    installed = has_triton() if triton is None else triton
    return Choice("compiled", "Triton") if installed else Choice("eager", "no package triton is installed")
