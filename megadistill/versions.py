"""Versions of what decides a run's numbers."""

import platform
from importlib.metadata import version

PACKAGES = ("megadistill", "torch", "deepspeed", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Package or `python` -> its version."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
