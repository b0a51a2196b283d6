"""The shards of a split as a table: an array in memory, or one mapped from the file `shards.npy`.

`shards.npy` is an .npy of records, 80 bytes a shard: sequences and bytes (int64), sha256 of the tar and of its index
(32 bytes each). Names follow a pattern; where they do not, each record has its name too. Ranks of one node that map
the file share its pages, and a `Shard` is made for each access.

Legend: P shards.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from megadistill.data.shards.hashed_record import Sha256
from megadistill.data.shards.shard import INDEX_SUFFIX, MAX_BYTES, MAX_NAME, MAX_SEQUENCES, NAME, Shard
from megadistill.data.storage.base import Bytes, Folder, sha256_of
from megadistill.data.storage.node_files import open_copy
from megadistill.errors import UserError
from megadistill.io import atomic_write, file_sha256

TABLE_FILE: Final = "shards.npy"
MAX_SHARDS: Final = 1 << 24
ROWS_AT_A_TIME: Final = 1 << 16
"""Rows that are checked or written at a time: what it costs in memory does not grow with the shards."""

_COLUMNS: Final = [("sequences", "<i8"), ("bytes", "<i8"), ("sha256", "V32"), ("index_sha256", "V32")]
_PATTERN: Final = re.compile(rf"^({NAME}|)\{{:0([1-9]|1[0-9])d\}}([A-Za-z._-][A-Za-z._-]*|)$")
_ALLOWED: Final = np.array([re.fullmatch(r"[A-Za-z0-9._-]", chr(code)) is not None for code in range(256)])

Rows = NDArray[np.void]
"""[P] records of `_COLUMNS`, with a field `name` behind them where the names follow no pattern."""


@dataclass(frozen=True)
class NamePattern:
    """Names that differ in a number alone, which grows by one a shard: `shard-00000.tar`, `shard-00001.tar`."""

    prefix: str
    digits: int
    """The least digits of the number."""
    suffix: str
    first: int

    def name(self, number: int) -> str:
        return f"{self.prefix}{self.first + number:0{self.digits}d}{self.suffix}"

    @property
    def text(self) -> str:
        return f"{self.prefix}{{:0{self.digits}d}}{self.suffix}"

    @classmethod
    def parse(cls, text: str, first: int) -> "NamePattern":
        """The pattern of a `text` such as `shard-{:05d}.tar`. Raises ValueError: it is none."""
        match = _PATTERN.match(text)
        if match is None:
            raise ValueError(f"{text[:80]!r} is no pattern of names such as 'shard-{{:05d}}.tar'")
        return cls(match[1], int(match[2]), match[3], first)

    @classmethod
    def of(cls, names: Sequence[str]) -> "NamePattern | None":
        """The pattern that all `names` follow in their order; None: there is none."""
        match = re.fullmatch(r"(.*?)([0-9]{1,18})([^0-9]*)", names[0])
        if match is None:
            return None
        pattern = cls(match[1], len(match[2]), match[3], int(match[2]))
        follow = _PATTERN.match(pattern.text) and all(name == pattern.name(number) for number, name in enumerate(names))
        return pattern if follow else None


class TableRecord(BaseModel):
    """The table of a split, as its manifest.json records it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: Annotated[str, Field(pattern=rf"^{TABLE_FILE}$")]
    count: Annotated[int, Field(ge=1, le=MAX_SHARDS)]
    """P, the number of shards."""
    names: Annotated[str, Field(max_length=MAX_NAME)] | None
    """Such as `shard-{:05d}.tar`; None: the names are in the table."""
    first: Annotated[int, Field(ge=0, lt=1 << 60)] | None
    """The number in the name of the first shard."""
    name_bytes: Annotated[int, Field(ge=1, le=MAX_NAME)] | None
    """Bytes of a name in the table; None where they follow a pattern."""
    sha256: Sha256


class ShardTable(Sequence[Shard]):
    """The shards of a split, in their order."""

    def __init__(self, rows_P: Rows, pattern: NamePattern | None) -> None:
        self._rows_P = rows_P
        self._pattern = pattern

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "ShardTable":
        """Raises ValueError: two shards or indices have the same name."""
        shards = tuple(shards)
        pattern = NamePattern.of([shard.name for shard in shards])
        width = None if pattern else max(len(shard.name) for shard in shards)
        rows_P = np.empty(len(shards), dtype=_dtype(width))
        rows_P["sequences"] = [shard.sequences for shard in shards]
        rows_P["bytes"] = [shard.bytes for shard in shards]
        for field in ("sha256", "index_sha256"):
            digests = bytes.fromhex("".join(getattr(shard, field) for shard in shards))
            rows_P[field] = np.frombuffer(digests, dtype="V32")
        if pattern is None:
            rows_P["name"] = [shard.name for shard in shards]
        table = cls(rows_P, pattern)
        table._require_distinct_names()
        return table

    @classmethod
    def read(cls, folder: Folder, record: TableRecord, where: str) -> "ShardTable":
        """The table that the manifest at `where` records; a local file is mapped, a remote one copied to this node.

        Raises:
            UserError: it is missing, cut off, or another one; one line.
        """
        path = f"{folder.location}/{record.file}"
        way_out = f"restore it, or get it again with {where}"
        dtype = _dtype(record.name_bytes)
        header = _header(record.count, dtype)
        expected = len(header) + record.count * dtype.itemsize
        try:
            file = open_copy(folder, record.file, size=expected, sha256=record.sha256)
        except OSError as error:
            raise UserError(
                f"{path}, the shard table of {where}, cannot be read ({error.strerror or error}): {way_out}"
            ) from None
        if file.size != expected:
            raise UserError(
                f"{path}: expected {expected} bytes, the table of {record.count:,} shards, found {file.size}: {way_out}"
            )
        if (digest := sha256_of(file)) != record.sha256:
            raise UserError(
                f"{path} was changed after it was written: expected sha256 {record.sha256[:12]}…, as {where} records, "
                f"found {digest[:12]}…: {way_out}"
            )
        try:
            return cls._checked(file, header, dtype, record)
        except ValueError as error:
            raise UserError(f"{path} is not a valid shard table: {error}: {way_out}") from None

    @classmethod
    def _checked(cls, file: Bytes, header: bytes, dtype: np.dtype[Any], record: TableRecord) -> "ShardTable":
        """Raises ValueError: a value makes no sense."""
        data = file.read(0, file.size)
        if data[: len(header)] != header:
            raise ValueError(f"expected an .npy of {record.count:,} records, found {bytes(data[:80])!r}")
        if (record.names is None) != (record.first is None) or (record.names is None) == (record.name_bytes is None):
            raise ValueError("expected either a pattern of names and its first number, or names in the table")
        pattern = None if record.names is None else NamePattern.parse(record.names, record.first or 0)
        table = cls(np.frombuffer(data, dtype=dtype, offset=len(header)), pattern)
        for column, most in (("sequences", MAX_SEQUENCES), ("bytes", MAX_BYTES)):
            values_P = table._rows_P[column]
            wrong = values_P.min() if values_P.min() < 1 else values_P.max()
            if not 1 <= wrong <= most:
                number = int((values_P == wrong).argmax())
                raise ValueError(f"shard {number}: expected {column} from 1 to {most}, found {wrong}")
        if pattern is None:
            table._require_names()
            table._require_distinct_names()
        return table

    def write(self, folder: Path) -> TableRecord:
        """Writes `shards.npy` into `folder`, whole or not at all."""
        dtype = self._rows_P.dtype
        with atomic_write(folder / TABLE_FILE) as file:
            file.write(_header(len(self), dtype))
            for start in range(0, len(self), ROWS_AT_A_TIME):
                file.write(self._rows_P[start : start + ROWS_AT_A_TIME].tobytes())
        pattern = self._pattern
        return TableRecord(
            file=TABLE_FILE,
            count=len(self),
            names=None if pattern is None else pattern.text,
            first=None if pattern is None else pattern.first,
            name_bytes=dtype["name"].itemsize if pattern is None else None,
            sha256=file_sha256(folder / TABLE_FILE),
        )

    @property
    def sequences(self) -> NDArray[np.int64]:
        """[P]: sequences of each shard; not copied."""
        return self._rows_P["sequences"]

    @property
    def bytes(self) -> NDArray[np.int64]:
        """[P]: bytes of each tar; not copied."""
        return self._rows_P["bytes"]

    def __len__(self) -> int:
        return len(self._rows_P)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, number: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(number, slice):
            return tuple(self[each] for each in range(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(f"shard {number} of {len(self)}")
        number %= len(self)
        sequences, size, sha256, index_sha256, *name = self._rows_P[number].tolist()
        return Shard(
            name=self._pattern.name(number) if self._pattern else name[0].decode("ascii"),
            sequences=sequences,
            bytes=size,
            sha256=sha256.hex(),
            index_sha256=index_sha256.hex(),
        )

    def name_test(self) -> Callable[[str], bool]:
        """A test whether a file is one of the tars or indices; its memory grows with names in the table alone."""
        pattern = self._pattern
        if pattern is None:
            names = set(self._rows_P["name"].tolist())
            return lambda name: name.removesuffix(INDEX_SUFFIX).encode(errors="surrogateescape") in names
        form = re.compile(rf"{re.escape(pattern.prefix)}([0-9]{{{pattern.digits},18}}){re.escape(pattern.suffix)}")

        def is_listed(name: str) -> bool:
            tar = name.removesuffix(INDEX_SUFFIX)
            match = form.fullmatch(tar)
            number = int(match[1]) - pattern.first if match else -1
            return 0 <= number < len(self) and pattern.name(number) == tar

        return is_listed

    def json_parts(self) -> Iterator[str]:
        """The JSON of a list of all shards, without white space, in parts: what pydantic writes of `Shard`s."""
        for start in range(0, len(self), ROWS_AT_A_TIME):
            rows = self._rows_P[start : start + ROWS_AT_A_TIME].tolist()
            names = (
                (name.decode("ascii") for *_, name in rows)
                if self._pattern is None
                else map(self._pattern.name, range(start, start + len(rows)))
            )
            part = ",".join(
                f'{{"name":"{name}","sequences":{sequences},"bytes":{size},"sha256":"{sha256.hex()}",'
                f'"index_sha256":"{index_sha256.hex()}"}}'
                for name, (sequences, size, sha256, index_sha256, *_) in zip(names, rows, strict=True)
            )
            yield f"{',' if start else '['}{part}"
        yield "]"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return self._pattern == other._pattern and np.array_equal(self._rows_P, other._rows_P)

    def __hash__(self) -> int:
        return hash((len(self), self[0], self[-1]))

    def __repr__(self) -> str:
        return f"<{len(self):,} shards from {self[0].name}>"

    def _require_names(self) -> None:
        """Raises ValueError: a name in the table is not one that `FileName` allows."""
        names_P = self._rows_P["name"]
        for start in range(0, len(self), ROWS_AT_A_TIME):
            part = np.ascontiguousarray(names_P[start : start + ROWS_AT_A_TIME])
            codes_PL = part.view(np.uint8).reshape(len(part), -1)
            ended_PL = np.logical_or.accumulate(codes_PL == 0, axis=1)
            whole_P = np.where(ended_PL, codes_PL == 0, _ALLOWED[codes_PL]).all(axis=1)
            whole_P &= _ALLOWED[codes_PL[:, 0]] & (codes_PL[:, 0] != ord(".")) & (codes_PL[:, 0] != ord("-"))
            if not whole_P.all():
                number = int(whole_P.argmin())
                raise ValueError(f"shard {start + number}: {bytes(part[number])!r} is no name of a file")

    def _require_distinct_names(self) -> None:
        """Raises ValueError: two shards or indices have the same name. Names of a pattern cannot."""
        if self._pattern is not None:
            return
        names_P = self._rows_P["name"]
        ascending, has_index_name = True, False
        for start in range(0, len(self), ROWS_AT_A_TIME):
            part = names_P[start : start + ROWS_AT_A_TIME + 1]
            ascending = ascending and bool((part[1:] > part[:-1]).all())
            has_index_name = has_index_name or bool(np.char.endswith(part, INDEX_SUFFIX.encode()).any())
        if has_index_name:
            tars = set(names_P.tolist())
            same = any(name + INDEX_SUFFIX.encode() in tars for name in tars)
        else:
            same = False
        if same or not (ascending or len(np.unique(names_P)) == len(self)):
            raise ValueError("two shards or indices have the same name")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        shards = handler.generate_schema(Annotated[tuple[Shard, ...], Field(min_length=1, max_length=MAX_SHARDS)])
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(cls.of, shards),
            python_schema=core_schema.no_info_wrap_validator_function(
                lambda value, validate: value if isinstance(value, cls) else cls.of(validate(value)), shards
            ),
            serialization=core_schema.plain_serializer_function_ser_schema(tuple, return_schema=shards),
        )


def _dtype(name_bytes: int | None) -> np.dtype[Any]:
    return np.dtype([*_COLUMNS, *([] if name_bytes is None else [("name", f"S{name_bytes}")])])


def _header(count: int, dtype: np.dtype[Any]) -> bytes:
    """The bytes that numpy writes before `count` records."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )
    return stream.getvalue()
