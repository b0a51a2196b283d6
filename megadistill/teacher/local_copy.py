"""A copy of a teacher's weights on a node's own disk, made once and verified by sha256 at every start.

One process of a node makes it. It holds config.json, the index and the files of weights, and `copy.json` with the size
and sha256 of each. Nothing deletes it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

from megadistill.errors import UserError
from megadistill.io import atomic_write, file_sha256, locked_folder, open_regular, read_json, reason_of, write_json
from megadistill.models.hf_folder import INDEX_FILE, SafetensorsFolder
from megadistill.units import readable

logger = logging.getLogger(__name__)

RECORD: Final = "copy.json"
_PART_BYTES: Final = 16 << 20
_THREADS: Final = 8
"""Files that are copied, or hashed, at a time: a thread hashes 1 to 2 GB/s."""
_SHA256: Final = re.compile("[0-9a-f]{64}")


def copy_folder(teacher: Path, copies: Path) -> Path:
    """The folder of a teacher's copy in the folder `copies` of a node: the teacher's name and a hash of its path."""
    path = teacher.absolute()
    return copies / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def make_copy(teacher: Path, copies: Path) -> str:
    """Makes or verifies this node's copy of the folder `teacher`; sha256 over the hashes of its files.

    A file is reused where its size, and size and time of the original, are as recorded, and its content has the
    recorded sha256; else it is copied again, hashed meanwhile, and gets its name when it is whole.

    It waits for another process that makes or verifies the same copy: of another run, or of an attempt that ends.

    Raises:
        UserError: the disk is too small, a file cannot be read or written, or an original of Hugging Face's cache has
            another sha256 than its name says.
    """
    folder = copy_folder(teacher, copies)
    logger.info("teacher: makes or verifies the copy in %s, after any other process that does", folder)
    try:
        with locked_folder(folder):
            return _make(teacher, folder)
    except OSError as error:
        name = error.filename or folder
        raise UserError(f"teacher.local_copy: {name} cannot be read or written: {reason_of(error)}") from None


def describe_copy(teacher: Path, copies: Path) -> str:
    """A line: bytes that a start would copy to this node, by the sizes of the files. Writes nothing.

    Raises:
        UserError: the disk is too small, or the teacher's folder cannot be read.
    """
    folder = copy_folder(teacher, copies)
    try:
        originals = _originals(teacher)
        present = _present(folder, originals, _recorded(folder))
        whole, missing = (
            sum(originals[name]["bytes"] for name in names) for names in (originals, originals.keys() - set(present))
        )
        replaced = sum(path.lstat().st_size for path in _replaced(folder, present))
        free = _require_space(folder, missing, teacher, deleted=replaced)
    except OSError as error:
        raise UserError(f"teacher.local_copy: {error.filename or folder} cannot be read: {reason_of(error)}") from None
    return f"{readable(missing, 'B')} of {readable(whole, 'B')} to copy to {folder}, {readable(free, 'B')} free"


def _originals(teacher: Path) -> dict[str, dict[str, int]]:
    """Size and time of each file that is copied."""
    names = ["config.json", *SafetensorsFolder(teacher).files]
    if (teacher / INDEX_FILE).is_file():
        names.append(INDEX_FILE)
    stats = {name: (teacher / name).stat() for name in names}
    return {name: {"bytes": stat.st_size, "modified": stat.st_mtime_ns} for name, stat in stats.items()}


def _present(folder: Path, originals: dict[str, dict[str, int]], recorded: dict[str, Any]) -> list[str]:
    """The files of the copy that are as recorded, by their sizes."""
    return [name for name in originals if _is_as_recorded(folder / name, originals[name], recorded.get(name))]


def _replaced(folder: Path, intact: Container[str]) -> list[Path]:
    """The files of the copy that are not intact: damaged ones, and those that the teacher does not have any more.

    An index of other files, or one file beside it, would be a second model in the folder.
    """
    files = [folder / "config.json", folder / INDEX_FILE, *folder.glob("*.safetensors")]
    return [path for path in files if os.path.lexists(path) and path.name not in intact]


def _make(teacher: Path, folder: Path) -> str:
    for partial in folder.glob(".*.tmp"):  # of a copy that was killed
        partial.unlink()
    originals, recorded = _originals(teacher), _recorded(folder)
    present = _present(folder, originals, recorded)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        hashes = zip(present, pool.map(file_sha256, (folder / name for name in present)), strict=True)
        record = {name: recorded[name] for name, sha256 in hashes if sha256 == recorded[name]["sha256"]}
        missing = [name for name in originals if name not in record]
        for path in _replaced(folder, record):
            path.unlink()
        _require_space(folder, sum(originals[name]["bytes"] for name in missing), teacher)
        copying = {pool.submit(_copy, teacher / name, folder / name): name for name in missing}
        try:
            for done in as_completed(copying):
                name = copying[done]
                record[name] = {**originals[name], "sha256": done.result()}
                write_json(folder / RECORD, {"teacher": str(teacher.absolute()), "files": record})
        finally:
            for each in copying:
                each.cancel()
    return hashlib.sha256(json.dumps({name: record[name]["sha256"] for name in sorted(originals)}).encode()).hexdigest()


def _recorded(folder: Path) -> dict[str, Any]:
    """The record of the copy's files; empty where it is damaged: they are copied again."""
    try:
        files = read_json(folder / RECORD)["files"]
        sound = all(isinstance(each["sha256"], str) for each in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return files if sound else {}


def _is_as_recorded(copy: Path, original: dict[str, int], recorded: Any) -> bool:
    if recorded is None or {key: recorded.get(key) for key in original} != original:
        return False
    return copy.is_file() and copy.stat().st_size == original["bytes"]


def _require_space(folder: Path, size: int, teacher: Path, *, deleted: int = 0) -> int:
    """Free bytes of the disk, when `deleted` bytes of it are."""
    exists = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(exists).free + deleted
    if size > free:
        raise UserError(
            f"teacher.local_copy: {folder.parent} has {readable(free, 'B')} free, and {readable(size, 'B')} of "
            f"{teacher} are not there yet: delete copies that are no longer needed, name a folder on a larger disk, or "
            "set the key to null"
        )
    return free


def _copy(source: Path, target: Path) -> str:
    """Copies a file and returns its sha256."""
    digest, size = hashlib.sha256(), source.stat().st_size
    with open_regular(source) as original, atomic_write(target) as copy:
        while part := original.read(_PART_BYTES):
            digest.update(part)
            copy.write(part)
        if copy.tell() != size:
            raise UserError(f"teacher.local_copy: {source} changed while it was copied: is it being written?")
        published = source.resolve().name  # Hugging Face's cache names large files so
        if _SHA256.fullmatch(published) and published != digest.hexdigest():
            raise UserError(
                f"teacher.local_copy: {source} has sha256 {digest.hexdigest()[:12]}…, and was published with "
                f"{published[:12]}…: download it again"
            )
    return digest.hexdigest()
