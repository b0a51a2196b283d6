"""Flat files of ids: OLMo-core's memory maps, which are called .npy and mostly have no header, true .npy, and raw ones.

Documents follow each other, each ended by EOS.
"""

from pathlib import Path
from typing import Final

import numpy as np

from megadistill.data.prepare.token_formats.token_scan import (
    Ids,
    ScanOptions,
    TokenFormat,
    TokenScan,
    refuse_halves,
)
from megadistill.data.shards.manifest import StoredDtype, token_dtype
from megadistill.data.shards.npy import MAX_HEADER_BYTES, MemberError, parse_npy_header
from megadistill.data.shards.shard import INDEX_SUFFIX
from megadistill.data.storage.base import Bytes, Folder
from megadistill.errors import UserError

MAGIC: Final = b"\x93NUMPY"
PEEK_PAIRS: Final = 1 << 15
"""Pairs of ids at the beginning of a file that tell whether their type is twice as wide."""
TYPES: Final[dict[str, StoredDtype]] = {name: name for name in ("uint16", "uint32", "int32", "int64")}


def _olmo_files(path: str) -> list[str]:
    """A file, or the .npy files of a folder."""
    if "://" in path or not Path(path).is_dir():
        return [path]
    names = sorted(
        str(file) for file in Path(path).iterdir() if file.suffix == ".npy" and not file.name.endswith(INDEX_SUFFIX)
    )
    if not names:
        raise UserError(f"{path} holds no .npy files: give OLMo-core's files, or a folder of them")
    return names


def _raw_files(path: str) -> list[str]:
    """One file."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the files of ids")
    return [path]


def _scan_olmo(folder: Folder, name: str, options: ScanOptions) -> TokenScan:
    """Without a header the ids have the narrowest type for the tokenizer, as OLMo-core writes them."""
    return _scan(folder, name, options, options.dtype or token_dtype(options.vocab_size))


def _scan_raw(folder: Folder, name: str, options: ScanOptions) -> TokenScan:
    """Raises UserError: it cannot be read, or is no whole number of ids."""
    if options.dtype is None:
        raise UserError(
            "--format raw: the files do not tell the type of their ids: give --dtype, such as uint16 or uint32"
        )
    return _scan(folder, name, options, options.dtype)


OLMO: Final = TokenFormat("olmo", _olmo_files, _scan_olmo)
RAW: Final = TokenFormat("raw", _raw_files, _scan_raw)


def _scan(folder: Folder, name: str, options: ScanOptions, headerless: str) -> TokenScan:
    path = f"{folder.location}/{name}"
    try:
        file = folder.open(name)
        begin = file.read(0, min(file.size, MAX_HEADER_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give a file of ids") from None
    if bytes(begin[: len(MAGIC)]) == MAGIC:
        return _scan_npy(path, file, begin, options)
    dtype = TYPES[headerless]
    itemsize = np.dtype(dtype).itemsize
    if file.size % itemsize:
        raise UserError(
            f"{path} has {file.size} bytes, no whole number of {dtype}: it was cut off, or give its --dtype"
        )
    refuse_halves(_beginning(file, itemsize), dtype, options.vocab_size, path)
    return TokenScan(dtype, np.array([[0, file.size // itemsize]]), None)


def _scan_npy(path: str, file: Bytes, begin: memoryview, options: ScanOptions) -> TokenScan:
    if options.dtype is not None:
        raise UserError(f"--dtype {options.dtype}: {path} has a header, which tells the type of its ids: leave it out")
    try:
        dtype, length, offset = parse_npy_header(bytes(begin))
    except MemberError as error:
        raise UserError(f"{path}: {error}: write its ids again") from None
    expected = offset + length * dtype.itemsize
    if file.size != expected or not length:
        raise UserError(f"{path}: expected {expected} bytes, as its header says, found {file.size}: copy it again")
    return TokenScan(TYPES[dtype.name], np.array([[offset, length]]), None)


def _beginning(file: Bytes, itemsize: int) -> Ids:
    """The first ids, as unsigned; none where they cannot be read, which their indexing tells."""
    try:
        data = file.read(0, 2 * itemsize * min(file.size // (2 * itemsize), PEEK_PAIRS))
    except OSError:
        data = memoryview(b"")
    return np.frombuffer(data, dtype=f"<u{itemsize}")
