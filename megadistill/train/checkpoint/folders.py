"""Checkpoint folders of a run by step, and whether one is complete. Does not import torch: a start reads this first."""

import os
import re
from pathlib import Path

from megadistill.io import read_json

MAX_MANIFEST_BYTES = 64 << 20


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint below `folder`, oldest first; empty where `folder` does not exist.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    steps = ((step_of(name), name) for name in names)
    return dict(sorted((step, folder / name) for step, name in steps if step is not None))


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder of this name; None for any other name."""
    match = re.fullmatch(r"step-(\d{8,18})", name, flags=re.ASCII)
    return None if match is None or name != checkpoint_name(int(match[1])) else int(match[1])


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def has_all_files(checkpoint: Path) -> bool:
    """Whether the checkpoint's files have the sizes of its manifest. Reads no weights, so it compares no hashes."""
    try:
        files = read_json(checkpoint / "manifest.json", max_bytes=MAX_MANIFEST_BYTES)["files"]
        return bool(files) and all((checkpoint / name).stat().st_size == files[name]["bytes"] for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
