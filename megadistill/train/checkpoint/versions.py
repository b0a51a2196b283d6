"""Versions of the packages that decide a run's numbers."""

import platform
from importlib.metadata import version

PACKAGES = ("megadistill", "torch", "deepspeed", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Version by package name, and by `python`."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
