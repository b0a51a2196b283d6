"""Files that come with the package: recipes, DeepSpeed files, scripts for Slurm and other launchers, a first recipe.

In a checkout the folders are at its root and this package links to them; a wheel has copies of them here.
"""

import stat
from filecmp import cmp
from importlib.resources import files
from pathlib import Path

from megadistill.errors import UserError
from megadistill.io import write_file

FOLDERS = ("recipes", "ds_configs", "slurm", "launch")

FIRST_RECIPE = Path("recipes", "mine.yaml")
"""The first recipe in a folder that `write_starter_files` fills."""

PRIVATE = (Path("slurm", "env.sh"),)
"""Files that a user of a checkout edits there: account, partition, paths."""

MAX_NAMED = 3
"""Files that a refusal names; the others it counts."""


def shipped_folder(name: str) -> Path:
    """One of `FOLDERS`, wherever the package is installed."""
    return _here() / name


def is_shipped(path: Path) -> bool:
    """Whether `write_starter_files` writes this path, relative to the folder, such as `recipes/smoke.yaml`."""
    return path == FIRST_RECIPE or (bool(path.parts) and path.parts[0] in FOLDERS and (_here() / path).exists())


def write_starter_files(folder: Path) -> list[Path]:
    """Writes the shipped files and a first recipe into `folder`; the paths in it, sorted.

    A file that is there already with the same content is left as it is.

    Raises:
        UserError: a file of the same name and another content is there; nothing is written.
        OSError: the folder cannot be written.
    """
    sources = {FIRST_RECIPE: _here() / FIRST_RECIPE.name}
    for name in FOLDERS:
        within = shipped_folder(name)
        sources |= {Path(name, path.relative_to(within)): path for path in within.rglob("*") if path.is_file()}
    sources = {path: source for path, source in sorted(sources.items()) if path not in PRIVATE}
    _refuse_others(folder, sources)
    for path, source in sources.items():
        if not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / path, source.read_bytes())
            (folder / path).chmod(source.stat().st_mode | stat.S_IWUSR)  # an installation may be read-only
    return list(sources)


def _refuse_others(folder: Path, sources: dict[Path, Path]) -> None:
    for parent in (folder, *(folder / name for name in FOLDERS)):
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{parent} is a file, and would become a folder: give another folder")
    others = [
        str(path)
        for path, source in sources.items()
        if (folder / path).exists() and not ((folder / path).is_file() and cmp(source, folder / path, shallow=False))
    ]
    if others:
        more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
        raise UserError(
            f"{folder} has other files of the same names: {', '.join(others[:MAX_NAMED])}{more}; nothing was written: "
            "move them away, or give another folder"
        )


def _here() -> Path:
    return Path(str(files(__name__)))
