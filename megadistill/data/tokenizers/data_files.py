"""The files of a data set's tokenizer, compared with the hashes that its manifest records."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from megadistill.data.shards.manifest import Manifest
from megadistill.data.tokenizers.folder_files import MAX_FILE_BYTES, NAMES, files_in
from megadistill.errors import UserError
from megadistill.io import file_sha256, reason_of


def read_files(manifest: Manifest) -> dict[str, bytes]:
    """The content of each file of the tokenizer, by its path in the tokenizer's folder.

    Raises:
        UserError: one is missing, or is not the one that the manifest records.
    """
    record = manifest.tokenizer
    place = manifest.folder.sibling(record.file.rpartition("/")[0] or ".")
    way_out = "restore it, or tokenize again"
    contents = {}
    for name in record.files or NAMES:
        try:
            contents[name] = place.read_whole(name, max_bytes=MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            if name in record.files:
                raise UserError(
                    f"data: {name}, a file of the tokenizer in {place.location}, cannot be read ({reason_of(error)}): "
                    f"{way_out}"
                ) from None
    if changed := next(changed_files(hashes_of(contents), record.files), None):
        raise UserError(f"data: {place.location}/{changed}: {way_out}")
    main = record.file.rpartition("/")[2]
    if main not in contents:
        raise UserError(f"data: {main}, the tokenizer of the shards, is missing from their folder: {way_out}")
    return contents


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes the files of a tokenizer, by their paths in `folder`."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def changed_files(hashes: Mapping[str, str], recorded: Mapping[str, str]) -> Iterator[str]:
    """A line for each recorded file that has another hash, or none; both are hashes by name."""
    for name, sha256 in recorded.items():
        if hashes.get(name) != sha256:
            actual = f"sha256 {hashes[name][:12]}…" if name in hashes else "none"
            yield f"{name}: expected sha256 {sha256[:12]}…, found {actual}"


def hashes_in(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a tokenizer in a local folder, by its path. Raises OSError: one is unreadable."""
    return {name: file_sha256(path) for name, path in files_in(folder).items()}


def hashes_of(contents: Mapping[str, bytes]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
