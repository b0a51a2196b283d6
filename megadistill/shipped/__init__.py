"""Files that come with the package: recipes, DeepSpeed files, Slurm scripts.

In a checkout they are at its root and this package links to them; a wheel has copies of them in this package.
"""

from importlib.resources import files
from pathlib import Path

FOLDERS = ("recipes", "ds_configs", "slurm")


def shipped_folder(name: str) -> Path:
    """One of `FOLDERS`, wherever the package is installed."""
    return Path(str(files(__name__))) / name
