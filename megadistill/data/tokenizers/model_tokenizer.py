"""Whether the tokenizer in a model's folder gives a text the ids that a data set has."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megadistill.data.shards.manifest import Manifest
from megadistill.data.tokenizers.folder_files import CONFIG_FILE, MAX_FILE_BYTES
from megadistill.data.tokenizers.huggingface import read_json, token_id
from megadistill.data.tokenizers.token_table import TokenTable, contradiction, difference
from megadistill.data.tokenizers.tokenizer_file import FILES, Kind, TokenizerFile, no_tokenizer_files, tokenizer_files
from megadistill.errors import UserError


def tokenizer_difference(folder: Path, manifest: Manifest) -> str | None:
    """The first difference between the tokenizers of a model's folder and of a data set, in words; None: the same ids.

    Files of the same kind are compared by their hashes, and where those differ by tokens and encoding; so are files of
    different kinds, where the two have no kind in common.

    Raises:
        UserError: the folder has no tokenizer, it cannot be read, or its files give different ids.
    """
    record = manifest.tokenizer
    theirs = {kind: TokenizerFile.read(kind, path) for kind, path in tokenizer_files(folder).items()}
    if not theirs:
        raise UserError(f"{no_tokenizer_files(folder)}: give the files of its tokenizer")
    ours = {kind: file for kind in FILES if (file := file_of_data(manifest, kind)) is not None}
    hashes = {kind: file.sha256 for kind, file in ours.items()} | {record.kind: record.sha256}
    if all(hashes.get(kind) == file.sha256 for kind, file in theirs.items()):
        return None
    _refuse_contradiction(folder, theirs)
    kind = record.kind if record.kind in theirs else next(iter(theirs))
    if hashes.get(kind) == theirs[kind].sha256:
        return None
    own = ours.get(kind) or next(iter(ours.values()), None)
    if own is None:
        return (
            f"{theirs[kind].name} has sha256 {theirs[kind].sha256[:12]}…, the shards were made with "
            f"{record.sha256[:12]}… ({record.file.rpartition('/')[2]}, which is not beside them to be compared)"
        )
    required = {id for id in (manifest.packer.bos, manifest.packer.eos) if id is not None}
    return difference(own.table, theirs[kind].table, required=required)


def file_of_data(manifest: Manifest, kind: Kind) -> TokenizerFile | None:
    """The data set's tokenizer as a file of a kind; None where it has none, or not the recorded one."""
    record = manifest.tokenizer
    place = manifest.folder.sibling(record.file.rpartition("/")[0] or ".")
    try:
        content = place.read_whole(FILES[kind], max_bytes=MAX_FILE_BYTES)
        file = TokenizerFile(kind, content, f"{place.location}/{FILES[kind]}")
        if kind == record.kind:
            return file if file.sha256 == record.sha256 else None
        recorded = record.files.get(FILES[kind])
        return file if recorded in (None, hashlib.sha256(content).hexdigest()) else None
    except (OSError, UserError):
        pass
    return None


def _refuse_contradiction(folder: Path, files: Mapping[Kind, TokenizerFile]) -> None:
    """Raises UserError: two files of a model's folder name different tokens for an id, or encode text differently."""
    problem = None
    if len(files) > 1:
        problem = contradiction(files["sentencepiece"].table, files["huggingface"].table)
    if problem is None and "huggingface" in files and (folder / CONFIG_FILE).is_file():
        problem = _other_added_tokens(files["huggingface"].table, folder / CONFIG_FILE)
    if problem is not None:
        raise UserError(
            f"the tokenizer files of {folder} contradict each other: {problem}: keep the one that the model was "
            "trained with, and remove the other"
        )


def _other_added_tokens(table: TokenTable, config: Path) -> str | None:
    added = read_json(config).get("added_tokens_decoder")
    for id, token in added.items() if isinstance(added, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        number = token_id(id)
        known = None if number is None else table.tokens.get(number)
        if known is not None and isinstance(content, str) and content != known:
            return f"id {id} is {known!r} in {table.name}, {content!r} in {config}"
    return None
