"""Members of a sample: the bytes of one file of a tar to an array of integers. It knows no files and trusts no bytes.

What may lie in a member is one row of uint16, uint32, int32 or int64, little-endian, and nothing else: no objects, so
nothing is ever unpickled.

Legend: L integers of a member.
"""

import io
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import TokenDtype, UnitRecord

MAX_HEADER_BYTES: Final = 10_000
"""Numpy's own bound on the text that it parses."""
MAX_LENGTH: Final = (1 << 24) + 1
"""Of a unit: what a manifest allows, and the last label."""
DTYPES: Final = tuple(np.dtype(name) for name in ("<u2", "<u4", "<i4", "<i8"))

Row = NDArray[np.integer[Any]]


class Misfit(ValueError):
    """A member is not what it should be: `expected …, found …`."""


@dataclass(frozen=True)
class NpyHeader:
    """What an .npy says of itself: L integers of `dtype`, from byte `offset`."""

    dtype: np.dtype[Any]
    length: int
    offset: int


def max_member_bytes(length: int) -> int:
    """More than any member with `length` integers can have."""
    return MAX_HEADER_BYTES + length * max(dtype.itemsize for dtype in DTYPES)


def row_of(data: memoryview, record: UnitRecord, *, dtype: TokenDtype, length: int | None) -> Row:
    """[L]: the tokens in the bytes of a member, as they are on the disk; `length` is what L should be, where known.

    Raises:
        Misfit: the bytes hold something else.
    """
    if record.kind == "npz":
        data = _unzipped(data, array=record.array, max_bytes=max_member_bytes(length or MAX_LENGTH))
    if record.kind == "raw" and len(data) % np.dtype(dtype).itemsize:
        raise Misfit(f"expected {dtype} tokens, found {len(data)} bytes")
    row = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")) if record.kind == "raw" else npy_row(data)
    if length is not None and len(row) != length:
        raise Misfit(f"expected {length} tokens, found {len(row)}")
    return row


def npy_row(data: memoryview) -> Row:
    """[L]: the integers in an .npy, not copied.

    Raises:
        Misfit: it is no .npy of one row of integers, or it has more or fewer bytes than it says.
    """
    header = npy_header(bytes(data[: _header_bytes(data)]))
    expected = header.offset + header.length * header.dtype.itemsize
    if len(data) != expected:
        raise Misfit(f"expected an .npy of {expected} bytes, as its header says, found {len(data)}")
    return np.frombuffer(data, dtype=header.dtype, count=header.length, offset=header.offset)


def _header_bytes(data: memoryview) -> int:
    """Where the numbers of an .npy begin, by its own word and within bounds: a short key for the cache."""
    said = 10 + int.from_bytes(data[8:10], "little") if bytes(data[6:7]) == b"\x01" else MAX_HEADER_BYTES
    return min(said, MAX_HEADER_BYTES)


def npy_header_of(shape: tuple[int, ...], dtype: str) -> bytes:
    """The bytes that numpy writes before an array of `shape`; `dtype` such as `<u2`."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@lru_cache(maxsize=1024)
def npy_header(data: bytes) -> NpyHeader:
    """The header that `data` begins with.

    Raises:
        Misfit: there is none, or it is not one of a row of integers.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise Misfit(f"expected an .npy of integers, found: {' '.join(str(error).split())[:200]}") from None
    if len(shape) != 1 or dtype not in DTYPES:
        raise Misfit(
            f"expected an .npy of one row of {', '.join(dtype.name for dtype in DTYPES)}, "
            f"found shape {shape} of {dtype.str}"
        )
    return NpyHeader(dtype, shape[0], stream.tell())


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name[:100]) for name in names[:10]) or "none"


def _unzipped(data: memoryview, *, array: str | None, max_bytes: int) -> memoryview:
    """The .npy in an .npz: the only one, or the one that `array` names."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            wanted = [name for name in names if array is None or name == f"{array}.npy"]
            if len(wanted) != 1:
                raise Misfit(f"expected one array{f' {array}' if array else ''} in the .npz, found {_listed(names)}")
            size = archive.getinfo(wanted[0]).file_size
            if size > max_bytes:
                raise Misfit(f"expected an array of at most {max_bytes} bytes, found {size}")
            with archive.open(wanted[0]) as file:
                return memoryview(file.read(max_bytes + 1))  # whatever its size is said to be
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise Misfit(f"expected an .npz, found: {' '.join(str(error).split())[:200]}") from None
