"""Decoding the members of a sample: untrusted bytes of an .npy, .npz or raw member to a row of integers.

A member holds one row of uint16, uint32, int32 or int64, little-endian, and nothing else: no objects, so nothing is
ever unpickled.

Legend: L integers of a member.
"""

import io
import zipfile
import zlib
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import SampleFormat, TokenDtype

MAX_HEADER_BYTES: Final = 10_000
"""Numpy's own bound on the header text that it parses."""
MAX_LENGTH: Final = (1 << 24) + 1
"""Most tokens of a sequence: the longest that a manifest allows, and the last label."""
DTYPES: Final = tuple(np.dtype(name) for name in ("<u2", "<u4", "<i4", "<i8"))

Row = NDArray[np.integer[Any]]


class MemberError(ValueError):
    """A member does not hold what it should: `expected …, found …`."""


def row_of(data: memoryview, record: SampleFormat, *, dtype: TokenDtype, length: int | None) -> Row:
    """[L]: the tokens in the bytes of a member, in their dtype on disk; `length` is the expected L, where known.

    Raises:
        MemberError: the bytes hold something else.
    """
    if record.kind == "npz":
        most = MAX_HEADER_BYTES + (length or MAX_LENGTH) * max(one.itemsize for one in DTYPES)
        data = _unzipped(data, array=record.array, max_bytes=most)
    if record.kind == "raw" and len(data) % np.dtype(dtype).itemsize:
        raise MemberError(f"expected {dtype} tokens, found {len(data)} bytes")
    row = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")) if record.kind == "raw" else npy_row(data)
    if length is not None and len(row) != length:
        raise MemberError(f"expected {length} tokens, found {len(row)}")
    return row


def npy_row(data: memoryview) -> Row:
    """[L]: the integers in an .npy, not copied.

    Raises:
        MemberError: it is not an .npy of one row of integers, or its size is not that of its header.
    """
    # A version 1 header gives its own length: a short key for the cache of parsed headers.
    size = 10 + int.from_bytes(data[8:10], "little") if bytes(data[6:7]) == b"\x01" else MAX_HEADER_BYTES
    dtype, length, offset = parse_npy_header(bytes(data[: min(size, MAX_HEADER_BYTES)]))
    expected = offset + length * dtype.itemsize
    if len(data) != expected:
        raise MemberError(f"expected an .npy of {expected} bytes, as its header says, found {len(data)}")
    return np.frombuffer(data, dtype=dtype, count=length, offset=offset)


def npy_header_of(shape: tuple[int, ...], dtype: str) -> bytes:
    """The bytes that numpy writes before an array of `shape`; `dtype` such as `<u2`."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@lru_cache(maxsize=1024)
def parse_npy_header(data: bytes) -> tuple[np.dtype[Any], int, int]:
    """dtype, L, and byte of the first integer, from the header that `data` begins with."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise MemberError(f"expected an .npy of integers, found: {' '.join(str(error).split())[:200]}") from None
    if len(shape) != 1 or dtype not in DTYPES:
        raise MemberError(
            f"expected an .npy of one row of {', '.join(dtype.name for dtype in DTYPES)}, "
            f"found shape {shape} of {dtype.str}"
        )
    return dtype, shape[0], stream.tell()


def _unzipped(data: memoryview, *, array: str | None, max_bytes: int) -> memoryview:
    """The .npy in an .npz: the only one, or the one that `array` names."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            arrays = [name for name in names if array is None or name == f"{array}.npy"]
            if len(arrays) != 1:
                listed = ", ".join(repr(name[:100]) for name in names[:10]) or "none"
                raise MemberError(f"expected one array{f' {array}' if array else ''} in the .npz, found {listed}")
            size = archive.getinfo(arrays[0]).file_size
            if size > max_bytes:
                raise MemberError(f"expected an array of at most {max_bytes} bytes, found {size}")
            with archive.open(arrays[0]) as file:
                return memoryview(file.read(max_bytes + 1))  # the archive's directory may understate the size
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise MemberError(f"expected an .npz, found: {' '.join(str(error).split())[:200]}") from None
