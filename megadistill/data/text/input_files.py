"""The files of a corpus: those that are given, and those of folders.

A folder that Hugging Face `datasets` wrote (`save_to_disk`) has the files that its `state.json` names: cached results
of `map` and `filter` lie beside them, and hold the same rows again.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from megadistill.data.text.file_errors import unreadable
from megadistill.errors import UserError
from megadistill.io import read_json, reason_of
from megadistill.redaction import printable

_STATE: Final = "state.json"
_INFO: Final = "dataset_info.json"
_SPLITS: Final = "dataset_dict.json"
"""File in the folder above the folders of a data set's splits."""


def find_files(
    inputs: Sequence[Path], include: Sequence[str], exclude: Sequence[str], *, output: Path
) -> Iterator[Path]:
    """Files as they are given, and those of folders in sorted order, without following symbolic links.

    `output`, which may lie inside of a folder, is left out.

    A folder's files are read that match a pattern of `include` and none of `exclude`. A pattern matches the
    path relative to the folder (`*` crosses `/`), the same with a leading `/`, or the file's name.

    Raises:
        UserError: an input does not exist, a folder cannot be read, or nothing matches.
    """
    any_file = False
    for given in inputs:
        _check_input(given)
        for path in [given] if given.is_file() else _walk(given, include, exclude, output.resolve()):
            any_file = True
            yield path
    names = ", ".join(map(str, inputs))
    if not any_file and tuple(include) == ("*",) and not exclude:
        raise UserError(f"there is no file in {names}: give files of text, or folders of them")
    if not any_file:
        raise UserError(
            f"no file of {names} matches --include {' '.join(include)}"
            f"{f' and not --exclude {chr(32).join(exclude)}' if exclude else ''}: change the patterns"
        )


def _check_input(given: Path) -> None:
    """Raises UserError: there is nothing at the path, or neither a file nor a folder."""
    if not given.exists():
        is_pattern = any(letter in given.name for letter in "*?[")
        problem = "matches no file" if is_pattern else "does not exist"
        raise UserError(f"{printable(str(given))} {problem}: give files of text, or folders of them")
    if not given.is_file() and not given.is_dir():
        raise UserError(f"{printable(str(given))} is neither a file nor a folder (a text is read more than once)")


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str], output: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in sorted(folders) if Path(parent, name).resolve() != output]
        for name in _in_order(Path(parent), names):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            chosen = _matches(relative, include) and not _matches(relative, exclude)
            if chosen and path.is_file() and not path.is_symlink():
                yield path


def _in_order(folder: Path, names: Sequence[str]) -> list[str]:
    """The files of a folder, sorted; of one that `datasets` wrote those of its rows, in the data set's order.

    Raises:
        UserError: its state cannot be read, a file is missing, or its rows are chosen by a file of row numbers.
    """
    if not {_STATE, _INFO} <= set(names):
        return sorted(set(names) - {_SPLITS})
    state = _state(folder / _STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{printable(str(folder))} has rows that are chosen by a file of row numbers: write it again with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    entries = state["_data_files"]
    files = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for file in files:
        if file not in names:
            raise UserError(
                f"{printable(str(folder))} lacks {printable(repr(file))[:200]}, which its {_STATE} names: copy the "
                "whole folder, or give the .arrow files themselves"
            )
    return [str(file) for file in files]


def _state(path: Path) -> dict[str, Any]:
    try:
        state = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}): copy the whole folder again") from None
    if not isinstance(state, dict) or not isinstance(state.get("_data_files"), list):
        raise UserError(
            f"{path} names no files of rows, as one of `datasets` does: give the files of the folder themselves"
        )
    return state


def _matches(relative: str, patterns: Iterable[str]) -> bool:
    forms = (relative, f"/{relative}", relative.rpartition("/")[2])
    return any(fnmatchcase(form, pattern) for pattern in patterns for form in forms)
