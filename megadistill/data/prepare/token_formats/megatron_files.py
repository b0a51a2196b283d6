"""Megatron's `.bin` and `.idx`: both kinds of index, those of Megatron-LM, of DeepSpeed and of fairseq.

An index has the number of ids of each item (Megatron calls it a sequence: a document, or a sentence of one), the place
of each in the `.bin`, and the items with which documents begin. What indices of the older kind (`TNTIDX`) name in ids,
those of the newer (`MMIDIDX`) name in bytes. The number of a dtype means another one in DeepSpeed's copy than in
Megatron; the bytes of an item tell which.

Legend: N items, D documents, G segments.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenFormat, TokenScan
from megadistill.data.shards.manifest import StoredDtype
from megadistill.data.storage.base import Folder
from megadistill.errors import UserError

DATA: Final = ".bin"
INDEX: Final = ".idx"
NEW_MAGIC: Final = b"MMIDIDX\x00\x00"
OLD_MAGIC: Final = b"TNTIDX\x00\x00"
VERSION: Final = 1
AGAIN: Final = "copy both files again, or preprocess the text again"

_FLOATS: Final = {(6, 8): "float64", (7, 8): "float64"}
_DTYPES: Final[dict[tuple[int, int], StoredDtype]] = {
    (1, 1): "uint8",
    (2, 1): "int8",
    (3, 2): "int16",
    (4, 4): "int32",
    (5, 8): "int64",
    (6, 2): "uint16",
    (7, 4): "uint32",
    (8, 2): "uint16",
    (8, 8): "uint64",
}
"""(number of a dtype, bytes of an id) -> dtype. Of 6 to 8 Megatron has 8: uint16, DeepSpeed 6: uint16, 7: uint32 and
8: uint64. Megatron's 7 is float32, in which nobody keeps ids: as uint32 they would be past every vocabulary."""

_Numbers = NDArray[np.integer[Any]]


class _IndexError(ValueError):
    """An index is damaged: `expected …, found …`."""


@dataclass(frozen=True)
class _Items:
    """The items of a `.bin`."""

    code: int
    """The number of the dtype."""
    counts_N: _Numbers
    """Ids of each item."""
    begins_N: _Numbers
    """The place of each item: in bytes, or in ids of `itemsize` bytes."""
    firsts_D: _Numbers
    """[D + 1]: the item with which each document begins; the last is N."""
    itemsize: int | None
    """Bytes of an id, where the index has it, and begins are ids; None: begins are bytes."""


def _files(path: str) -> list[str]:
    """The `.bin` of a prefix, or those of a folder."""
    if "://" not in path and Path(path).is_dir():
        names = sorted(str(file) for file in Path(path).iterdir() if file.suffix == DATA)
        if not names:
            raise UserError(f"{path} holds no {DATA} files: give the prefix of Megatron's {DATA} and {INDEX}")
        return names
    return [path.removesuffix(DATA).removesuffix(INDEX) + DATA]


def _scan(folder: Folder, name: str, options: ScanOptions) -> TokenScan:
    """Raises UserError: a file is missing, corrupt or cut off, or holds no ids; one line."""
    prefix = name.removesuffix(DATA)
    index, data = f"{folder.location}/{prefix}{INDEX}", f"{folder.location}/{name}"
    if options.dtype is not None:
        raise UserError(f"--dtype {options.dtype}: {index} tells the type of its ids: leave it out")
    try:
        size = folder.open(name).size
        file = folder.open(prefix + INDEX)
        content = file.read(0, file.size)
    except OSError as error:
        missing = getattr(error, "filename", None) or data
        raise UserError(
            f"{missing} cannot be read ({error.strerror or error}): give the prefix of a {DATA} with its {INDEX}"
        ) from None
    try:
        items = _parsed(content)
        _require_items(items)
        itemsize = items.itemsize or _itemsize(items, size)
        dtype = _dtype(items.code, itemsize)
        segments_G2 = _segments(items, itemsize, size)
    except _IndexError as error:
        raise UserError(f"{index}: {error}: {AGAIN}") from None
    places_N = np.concatenate(([0], np.cumsum(items.counts_N, dtype=np.int64)))
    starts_D = np.unique(places_N[items.firsts_D[:-1]])
    return TokenScan(dtype, segments_G2, starts_D[starts_D < places_N[-1]])


MEGATRON: Final = TokenFormat("megatron", _files, _scan)


def _parsed(content: memoryview) -> _Items:
    if bytes(content[: len(NEW_MAGIC)]) == NEW_MAGIC:
        return _new_items(content)
    if bytes(content[: len(OLD_MAGIC)]) == OLD_MAGIC:
        return _old_items(content)
    raise _IndexError(f"expected an index that begins with MMIDIDX or TNTIDX, found {bytes(content[:9])!r}")


def _new_items(content: memoryview) -> _Items:
    """MMIDIDX: counts int32 [N], begins in bytes int64 [N], documents int64 [D + 1], and modes int8 [N] or none."""
    header = struct.Struct("<QBQQ")
    start = len(NEW_MAGIC) + header.size
    if len(content) < start:
        raise _IndexError(f"expected a header of {start} bytes, found {len(content)}")
    version, code, items, documents = header.unpack_from(content, len(NEW_MAGIC))
    _require_version(version)
    whole = start + 12 * items + 8 * documents
    if len(content) not in (whole, whole + items):
        raise _IndexError(
            f"expected {whole} bytes for {items} sequences and {documents} bounds of documents, found {len(content)}"
        )
    counts_N = np.frombuffer(content, "<i4", items, start)
    begins_N = np.frombuffer(content, "<i8", items, start + 4 * items)
    firsts_D = np.frombuffer(content, "<i8", documents, start + 12 * items)
    if np.frombuffer(content, "<i1", len(content) - whole, whole).any():
        raise _IndexError("expected sequences of text alone, found others too (its modes are not all 0)")
    return _Items(code, counts_N, begins_N, firsts_D, None)


def _old_items(content: memoryview) -> _Items:
    """TNTIDX: for each item where its dimensions begin [N + 1] and where its ids do [N + 1], the sizes, and documents
    [D + 1], all int64; fairseq's has no documents: each item is one."""
    header = struct.Struct("<QQQQQ")
    start = len(OLD_MAGIC) + header.size
    if len(content) < start + 8:
        raise _IndexError(f"expected a header of {start + 8} bytes, found {len(content)}")
    version, code, itemsize, items, sizes = header.unpack_from(content, len(OLD_MAGIC))
    _require_version(version)
    whole = start + 8 * (2 * (items + 1) + sizes)
    documents = None
    if len(content) != whole:
        (documents,) = struct.unpack_from("<Q", content, start)
        start, whole = start + 8, whole + 8 + 8 * documents
    if len(content) != whole or sizes != items:
        raise _IndexError(f"expected {whole} bytes for {items} items of one dimension, found {len(content)}")
    values = np.frombuffer(content, "<i8", (whole - start) // 8, start)
    dimensions, begins, counts, firsts = np.split(values, np.cumsum([items + 1, items + 1, items]))
    if (dimensions != np.arange(items + 1)).any():
        raise _IndexError("expected items of one dimension, found others")
    if itemsize not in (1, 2, 4, 8):
        raise _IndexError(f"expected ids of 1, 2, 4 or 8 bytes, found {itemsize}")
    return _Items(code, counts, begins[:-1], np.arange(items + 1) if documents is None else firsts, itemsize)


def _require_version(version: int) -> None:
    if version != VERSION:
        raise _IndexError(f"expected version {VERSION}, found {version}")


def _require_items(items: _Items) -> None:
    """Raises _IndexError: there are none, or numbers of them make no sense."""
    counts_N, firsts_D = items.counts_N, items.firsts_D
    if not len(counts_N) or not counts_N.any():
        raise _IndexError("expected ids, found none")
    if counts_N.min() < 0:
        raise _IndexError(f"sequence {int(counts_N.argmin())}: expected a length, found {counts_N.min()}")
    rises = bool((firsts_D[1:] >= firsts_D[:-1]).all())  # a difference of numbers that make no sense may overflow
    climbs = len(firsts_D) and firsts_D[0] == 0 and firsts_D[-1] == len(counts_N) and rises
    if not climbs:
        ends = f"{firsts_D[0]} to {firsts_D[-1]}" if len(firsts_D) else "none"
        raise _IndexError(f"expected bounds of documents that climb from 0 to {len(counts_N)}, found {ends}")


def _itemsize(items: _Items, size: int) -> int:
    """Bytes of an id, from the `size` of the .bin: the index has the number of a dtype alone."""
    ids = int(items.counts_N.sum(dtype=np.int64))
    fixed = [bytes for code, bytes in (*_DTYPES, *_FLOATS) if code == items.code]
    if not fixed:
        raise _IndexError(f"expected the number of a dtype from 1 to 8, found {items.code}")
    if size % ids or size // ids not in fixed:
        expected = " or ".join(f"{ids * bytes}" for bytes in sorted(set(fixed)))
        raise _IndexError(f"expected {expected} bytes in its {DATA}, for {ids} ids, found {size}")
    return size // ids


def _dtype(code: int, itemsize: int) -> StoredDtype:
    dtype = _DTYPES.get((code, itemsize))
    if dtype is None:
        other = _FLOATS.get((code, itemsize), f"the dtype {code} with {itemsize} bytes")
        raise _IndexError(f"expected ids, which are integers, found {other}")
    return dtype


def _segments(items: _Items, itemsize: int, size: int) -> NDArray[np.int64]:
    """[G, 2]: begin in bytes and number of ids of each run of items that touch each other in the .bin."""
    unit = 1 if items.itemsize is None else itemsize
    begins_N, counts_N = (values[items.counts_N > 0].astype(np.int64) for values in (items.begins_N, items.counts_N))
    inside_N = (begins_N >= 0) & (begins_N <= size // unit) & (counts_N <= size)
    inside_N &= np.where(inside_N, begins_N, 0) * unit + np.where(inside_N, counts_N, 0) * itemsize <= size
    if not inside_N.all():
        first = int(inside_N.argmin())
        raise _IndexError(
            f"expected sequences inside the {size} bytes of its {DATA}, found {counts_N[first]} ids from "
            f"{'byte' if unit == 1 else 'id'} {begins_N[first]} on"
        )
    if int(counts_N.sum()) * itemsize != size:
        raise _IndexError(
            f"expected {int(counts_N.sum()) * itemsize} bytes in its {DATA}, for {counts_N.sum()} ids, found {size}"
        )
    begins_N = begins_N * unit
    breaks = np.flatnonzero(begins_N[1:] != begins_N[:-1] + counts_N[:-1] * itemsize) + 1
    runs = np.concatenate(([0], breaks))
    return np.stack([begins_N[runs], np.add.reduceat(counts_N, runs)], axis=1)
