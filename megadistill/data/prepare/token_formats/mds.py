"""Mosaic MDS: where the ids of each sample lie in a shard.

A folder has `index.json` (version 2), which names its shards, such as `shard.00000.mds`. A shard is, little-endian:

    n, the number of samples: uint32; n + 1 offsets: uint32, the byte where each sample begins, and the last one ends
    its columns, in JSON
    each sample: the size (uint32) of each column that has no fixed one; then the columns, in their order

An `ndarray` is its values, behind a byte for the dtype and a shape where its encoding does not name them
(`ndarray:int32`, `ndarray:int32:2048`). The shape is a byte, `axes << 2 | log2(bytes of a length)`, and its lengths.
`bytes` are values whose dtype only their writer knows.

Legend: n samples of a shard, C columns, V of which have no fixed size.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megadistill.data.prepare.token_formats.id_columns import id_column, listed, refuse_dtype, scan_of_rows
from megadistill.data.prepare.token_formats.token_scan import (
    ScanOptions,
    Stored,
    TokenFormat,
    TokenScan,
    refuse_halves,
)
from megadistill.data.shards.manifest import StoredDtype
from megadistill.data.storage.base import Folder
from megadistill.data.storage.open import folder_of
from megadistill.errors import UserError
from megadistill.io import parse_json, reason_of

INDEX: Final = "index.json"
MAX_INDEX_BYTES: Final = 1 << 27
"""A shard takes 400 bytes of it."""
MAX_SAMPLES: Final = 1 << 25
"""Samples of a shard: its 4 GiB, which offsets of 4 bytes allow, have 128 bytes for each of so many."""
MAX_COLUMNS: Final = 1000
MAX_COLUMN_BYTES: Final = 1 << 20
"""Bytes of the columns' description in a shard."""
PEEK_SAMPLES: Final = 100
"""Samples of bytes that tell whether their type is the given one, or twice as wide."""
WORD: Final = 4
"""Bytes of an offset, and of a size."""
DTYPES: Final[dict[int, StoredDtype]] = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    32: "uint32",
    33: "int32",
    64: "uint64",
    65: "int64",
}
"""The byte that tells a dtype of integers; those of floating point are 18, 34 and 66."""
AGAIN: Final = ": get the shard again"
WAY_OUT: Final = f"give a folder that MDSWriter of mosaicml-streaming wrote, with its {INDEX}"

Counts = NDArray[np.int64]


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    basename: str


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Literal["mds"]
    raw_data: _File
    zip_data: _File | None = None


class _Index(BaseModel):
    model_config = ConfigDict(strict=True)

    version: Literal[2]
    shards: Annotated[list[_Shard], Field(min_length=1)]


class _Columns(BaseModel):
    """The columns of a shard, as it describes them itself."""

    model_config = ConfigDict(strict=True)

    version: Literal[2]
    format: Literal["mds"]
    column_names: Annotated[list[str], Field(min_length=1, max_length=MAX_COLUMNS)]
    column_encodings: list[str]
    column_sizes: list[Annotated[int, Field(ge=0, lt=1 << 32)] | None]
    """[C] bytes; None or 0: not fixed."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "_Columns":
        if not len(self.column_names) == len(self.column_encodings) == len(self.column_sizes):
            raise ValueError("column_names, column_encodings and column_sizes differ in length")
        return self


@dataclass(frozen=True)
class _IdColumn:
    place: int
    dtype: StoredDtype | None
    """None: each value begins with its own."""
    has_shape: bool
    """Whether each value has its shape in front."""


def _files(path: str) -> list[str]:
    """The shards that the index.json of a folder names; `path` is the folder, or its index.json.

    Raises:
        UserError: it is missing, damaged or of another format, or a shard is there compressed alone; one line.
    """
    location = path.removesuffix(f"/{INDEX}").rstrip("/")
    folder = folder_of(location)
    where = f"{folder.location}/{INDEX}"
    try:
        values = parse_json(folder.read_whole(INDEX, max_bytes=MAX_INDEX_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read: {reason_of(error)}: {WAY_OUT}") from None
    try:
        shards = _Index.model_validate(values).shards
    except ValidationError as error:
        raise UserError(f"{where} is no index of MDS: {_reason(error)}: {WAY_OUT}") from None
    for shard in shards:
        if "/" in shard.raw_data.basename:
            raise UserError(
                f"{where} joins several folders, such as that of {shard.raw_data.basename[:80]!r}: index each by "
                f"itself, with its own {INDEX}"
            )
        if shard.zip_data is not None:
            _require_decompressed(folder, shard.raw_data.basename, shard.zip_data.basename)
    return [f"{location}/{shard.raw_data.basename}" for shard in shards]


def _require_decompressed(folder: Folder, raw: str, compressed: str) -> None:
    try:
        folder.open(raw)
    except OSError:
        raise UserError(
            f"{folder.location}/{compressed} is compressed as a whole, so that no sequence in it can be read alone: "
            f"decompress every shard beside it, this one as {raw}; {INDEX} stays as it is"
        ) from None


def _stored(folder: Folder, name: str, options: ScanOptions) -> Stored:
    """Reads the columns, and the first sample where arrays tell their own type."""
    shard = _opened(folder, name, options)
    dtype = shard.column.dtype
    if dtype is None:
        begins_n, sizes_n = shard.values(samples=1)
        dtype = _one_dtype(_heads(shard.content, begins_n, sizes_n, 1, shard.where)[:, 0], shard.where)
    return dtype, None


def _scan(folder: Folder, name: str, options: ScanOptions) -> TokenScan:
    """Raises UserError: the shard is damaged or cut off, or the column holds no ids of one type; one line."""
    shard = _opened(folder, name, options)
    content, where, dtype = shard.content, shard.where, shard.column.dtype
    begins_n, sizes_n = shard.values()
    if dtype is None:
        dtype = _one_dtype(_heads(content, begins_n, sizes_n, 1, where)[:, 0], where)
        begins_n, sizes_n = begins_n + 1, sizes_n - 1
    lengths_n = None
    if shard.column.has_shape:
        begins_n, sizes_n, lengths_n = _behind_shapes(content, begins_n, sizes_n, where)
    width = np.dtype(dtype).itemsize
    counts_n, left_n = np.divmod(sizes_n, width)
    _require(left_n == 0, where, f"whole ids of {dtype}", sizes_n, "bytes")
    if lengths_n is not None:
        _require(lengths_n == counts_n, where, "as many ids as its shape says", counts_n, "ids")
    if options.dtype is not None:
        pairs = zip(begins_n[:PEEK_SAMPLES].tolist(), (counts_n[:PEEK_SAMPLES] // 2).tolist(), strict=True)
        first = np.concatenate([content[begin : begin + 2 * width * count] for begin, count in pairs])
        refuse_halves(first.view(f"<u{width}"), dtype, options.vocab_size, where)
    return scan_of_rows(dtype, np.stack([begins_n, counts_n], axis=1), counts_n)


@dataclass(frozen=True)
class _Opened:
    """A shard whose offsets and columns have been read."""

    where: str
    content: NDArray[np.uint8]
    offsets: Counts
    sizes_C: list[int | None]
    column: _IdColumn

    def values(self, *, samples: int | None = None) -> tuple[Counts, Counts]:
        """[n], [n]: the byte where the ids' value begins in each sample, and its bytes; of the first `samples`."""
        offsets = self.offsets if samples is None else self.offsets[: samples + 1]
        return _values(self.content, offsets, self.sizes_C, self.column.place, self.where)


def _opened(folder: Folder, name: str, options: ScanOptions) -> _Opened:
    where = f"{folder.location}/{name}"
    try:
        file = folder.open(name)
        content = np.frombuffer(file.read(0, file.size), dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({reason_of(error)}): get it again, with {INDEX}") from None
    offsets = _offsets(content, where)
    columns = _columns(content[WORD * (len(offsets) + 1) : int(offsets[0])], where)
    return _Opened(where, content, offsets, columns.column_sizes, _id_column(columns, options, where))


def _offsets(content: NDArray[np.uint8], where: str) -> Counts:
    """[n + 1]: where each sample begins, and the last one ends, which is the end of the file."""
    count = int.from_bytes(content[:WORD].tobytes(), "little")
    head = WORD * (count + 2)
    if not 1 <= count <= MAX_SAMPLES or head > len(content):
        raise UserError(
            f"{where}: expected from 1 to {MAX_SAMPLES} samples, and their offsets, found {count} samples in "
            f"{len(content)} bytes{AGAIN}"
        )
    offsets = content[WORD:head].view("<u4").astype(np.int64)
    _require(np.diff(offsets, prepend=head) >= 0, where, "a begin behind what stands before it", offsets, "as its byte")
    if offsets[-1] != len(content):
        raise UserError(f"{where}: expected {offsets[-1]} bytes, as its offsets say, found {len(content)}{AGAIN}")
    return offsets


def _columns(text: NDArray[np.uint8], where: str) -> _Columns:
    try:
        if len(text) > MAX_COLUMN_BYTES:
            raise ValueError(f"it has {len(text)} bytes, more than {MAX_COLUMN_BYTES}")
        return _Columns.model_validate(parse_json(text.tobytes()))
    except ValidationError as error:
        reason = _reason(error)
    except ValueError as error:
        reason = reason_of(error)
    raise UserError(f"{where}: the description of its columns cannot be read: {reason}{AGAIN}") from None


def _id_column(columns: _Columns, options: ScanOptions, where: str) -> _IdColumn:
    place = id_column(columns.column_names, options.column, where)
    column, encoding = columns.column_names[place][:80], columns.column_encodings[place]
    kind, _, rest = encoding.partition(":")
    name, _, shape = rest.partition(":")
    if kind == "bytes":
        if options.dtype not in get_args(StoredDtype):
            raise UserError(f"{where}: column {column!r} is bytes, which do not tell their type: give --dtype")
        return _IdColumn(place, cast(StoredDtype, options.dtype), has_shape=False)
    if kind != "ndarray" or (name and name not in DTYPES.values()):
        raise UserError(
            f"{where}: column {column!r} is {encoding[:80]!r}, and ids are an ndarray of integers, or bytes: give "
            f"--column, one of {listed(columns.column_names)}"
        )
    refuse_dtype(options, where)
    return _IdColumn(place, cast(StoredDtype, name) if name else None, has_shape=not shape)


def _values(
    content: NDArray[np.uint8], offsets: Counts, sizes_C: list[int | None], place: int, where: str
) -> tuple[Counts, Counts]:
    """[n], [n]: the byte where the value of a column begins in each sample, and its bytes."""
    starts_n, stops_n = offsets[:-1], offsets[1:]
    variable = [column for column, size in enumerate(sizes_C) if not size]
    head = WORD * len(variable)
    given_nV = _heads(content, starts_n, stops_n - starts_n, head, where).view("<u4")
    at_n = starts_n + head
    for column, size in enumerate(sizes_C):
        sizes_n = np.full_like(at_n, size) if size else given_nV[:, variable.index(column)].astype(np.int64)
        if column == place:
            value = at_n, sizes_n
        at_n = at_n + sizes_n
    _require(at_n == stops_n, where, "columns that end with the sample", at_n - starts_n, "bytes of columns")
    return value


def _behind_shapes(
    content: NDArray[np.uint8], begins_n: Counts, sizes_n: Counts, where: str
) -> tuple[Counts, Counts, Counts]:
    """The begins and bytes of what stands behind the shapes, which have one axis; and its lengths."""
    codes_n = _heads(content, begins_n, sizes_n, 1, where)[:, 0].astype(np.int64)
    _require(codes_n >> 2 == 1, where, "an array of one axis", codes_n >> 2, "axes")
    widths_n = 1 << (codes_n & 3)
    begins_n, sizes_n = begins_n + 1, sizes_n - 1
    _require(sizes_n >= widths_n, where, "the length of its array", sizes_n, "bytes")
    lengths_n = np.empty_like(begins_n)
    for width in np.unique(widths_n).tolist():
        rows = np.flatnonzero(widths_n == width)
        lengths_n[rows] = _heads(content, begins_n[rows], sizes_n[rows], width, where).view(f"<u{width}")[:, 0]
    return begins_n + widths_n, sizes_n - widths_n, lengths_n


def _heads(content: NDArray[np.uint8], begins_n: Counts, sizes_n: Counts, width: int, where: str) -> NDArray[np.uint8]:
    """[n, width]: the first bytes of values of `sizes_n` bytes."""
    _require(sizes_n >= width, where, f"{width} bytes at least", sizes_n, "bytes")
    heads: NDArray[np.uint8] = content[begins_n[:, None] + np.arange(width)]
    return heads


def _one_dtype(codes_n: NDArray[np.uint8], where: str) -> StoredDtype:
    code = int(codes_n[0])
    if code not in DTYPES:
        raise UserError(f"{where} sample 0: expected an array of integers, found code {code} of a dtype: give --column")
    _require(codes_n == code, where, f"code {code} of a dtype, as in sample 0", codes_n, "as its code")
    return DTYPES[code]


def _require(holds_n: NDArray[np.bool_], where: str, expected: str, values_n: NDArray[Any], unit: str) -> None:
    if not holds_n.all():
        sample = int(holds_n.argmin())
        raise UserError(f"{where} sample {sample}: expected {expected}, found {int(values_n[sample])} {unit}{AGAIN}")


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


MDS: Final = TokenFormat("mds", _files, _scan, _stored)
