"""Records of finished indices: a command that was broken off, started again, does not read their files again.

The record of `web.bin` is `.web.bin.json` beside its index. It is written after the index, and deleted when all files
are indexed.
"""

import hashlib
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from megadistill.data.prepare.token_formats.index_file import IndexedFile, IndexSpec, ShowIds, index_file
from megadistill.data.shards.shard import INDEX_SUFFIX
from megadistill.data.storage.base import Folder
from megadistill.io import file_sha256, read_file, write_file

RECORDS: Final = ".*.json"


class _Record(BaseModel):
    """The index of a file, and what it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: str
    """sha256 of the options and of the tokenizer."""
    identity: str
    """Inode and times of the file of ids, or its tag in a store."""
    file: IndexedFile


def indexed_once(
    folder: Folder, name: str, output: Path, spec: IndexSpec, tokenizer: str, show: ShowIds
) -> IndexedFile:
    """The index of a file, unless an earlier start made it from the same file, options and `tokenizer` (a sha256).

    Raises:
        UserError: as `index_file`.
    """
    digest = hashlib.sha256(f"{spec} {tokenizer}".encode()).hexdigest()
    try:
        opened = folder.open(name)
        identity = "" if opened.identity is None else f"{opened.identity} {opened.size}"
    except OSError:  # `index_file` tells it
        identity = ""
    path = output / f".{name}.json"
    known = _load(path, output / (name + INDEX_SUFFIX), digest, identity)
    if known is not None:
        return known
    path.unlink(missing_ok=True)
    file = index_file(folder, name, output, spec, show)
    if file.shard is not None and identity:
        write_file(path, _Record(spec=digest, identity=identity, file=file).model_dump_json())
    return file


def remove_records(output: Path, files: set[str]) -> None:
    """Deletes the records, and those of their indices that are not of `files`: an earlier start had others."""
    for path in output.glob(RECORDS):
        name = path.name.removeprefix(".").removesuffix(".json")
        index = output / (name + INDEX_SUFFIX)
        if not index.exists():
            continue
        path.unlink()
        if name not in files:
            index.unlink()


def _load(path: Path, index: Path, digest: str, identity: str) -> IndexedFile | None:
    try:
        record = _Record.model_validate_json(read_file(path))
        shard = record.file.shard
        whole = shard is not None and file_sha256(index) == shard.index_sha256
    except (OSError, ValueError):
        return None
    return record.file if whole and identity and (record.spec, record.identity) == (digest, identity) else None
