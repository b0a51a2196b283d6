"""Shards: plain WebDataset tars of fixed-length units, an index for each, a manifest for all. It knows no order.

A split is one folder: `manifest.json`, `shard-00000.tar` (a member `{key}.tokens.npy` a unit) and its index
`shard-00000.tar.idx.npy` (a row a unit: where its bytes lie, and their crc32). Any WebDataset reader can read the tars;
this one reads through the index, because tar iteration takes a broken header for the end of the file. The manifest is
written last: a folder without one is unfinished.

Legend: S tokens of a sequence, U units of a shard.
"""

import hashlib
import io
import itertools
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from webdataset import TarWriter

from megadistill.errors import OperatorFault, UserError

FORMAT_VERSION: Final = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 30
UINT16_IDS = 1 << 16

# One name or a path of names below the folder; no name begins with a dot, so none is "..".
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
FileName = Annotated[str, Field(pattern=rf"^{_NAME}$", max_length=200)]
RelativePath = Annotated[str, Field(pattern=rf"^{_NAME}(/{_NAME})*$", max_length=1000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 60)]

TokenDtype = Literal["uint16", "uint32"]
Unit = NDArray[np.unsignedinteger[Any]]


class ShardFault(OperatorFault):
    """A shard does not hold what its manifest says. One line: slot, shard, unit, byte offset, what was expected."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(_Record):
    """One tar file and its index."""

    name: FileName
    units: Annotated[int, Field(ge=1, le=1 << 32)]
    bytes: Annotated[int, Field(ge=1, le=1 << 50)]
    sha256: Sha256
    index: FileName
    index_sha256: Sha256


class TokenizerRecord(_Record):
    """The tokenizer that made the ids."""

    kind: Literal["sentencepiece"]
    file: RelativePath
    """Relative to the data set: the folder that holds the folder of the split."""
    sha256: Sha256


class PackerRecord(_Record):
    """How documents became units."""

    name: Literal["chunk"]
    version: Annotated[int, Field(ge=1)]
    bos: bool
    """Whether a begin-of-sentence id stands before each document."""
    eos: bool
    """Whether an end-of-sentence id stands after each document."""


class SourceRecord(_Record):
    """What the text was, in words: last names of the inputs, the patterns, the share of documents held out."""

    inputs: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)]


class Manifest(_Record):
    """One split of a data set. Immutable: its fingerprint is part of every position in its stream."""

    version: Literal[1]
    split: FileName
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    dtype: TokenDtype
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    """The true number of ids, no padding."""
    tokenizer: TokenizerRecord
    packer: PackerRecord
    documents: Count
    tokens: Count
    """Tokens that are predicted: units times sequence_length."""
    text_bytes: Annotated[int, Field(ge=1, le=1 << 60)]
    """UTF-8 bytes of those tokens' text: bits a byte = nats a token · tokens / (text_bytes · ln 2)."""
    source: SourceRecord
    shards: Annotated[tuple[Shard, ...], Field(min_length=1, max_length=1 << 24)]

    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Manifest":
        if self.dtype != token_dtype(self.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not go with vocab_size {self.vocab_size}")
        if self.tokens != self.units * self.sequence_length:
            raise ValueError(
                f"tokens is {self.tokens}, but {self.units} units of {self.sequence_length} make "
                f"{self.units * self.sequence_length}"
            )
        names = [name for shard in self.shards for name in (shard.name, shard.index)]
        if len(set(names)) != len(names):
            raise ValueError("two shards or indices have the same name")
        return self

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """The manifest at `path`, `.../manifest.json`.

        Raises:
            UserError: there is none, or it is not one that this version can trust; one line.
        """
        again = "run `megadistill tokenize` again, or restore the file that it wrote"
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise UserError(f"{path} has {path.stat().st_size} bytes, no manifest does: {again}")
            text = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): give the manifest.json of a split, "
                "which `megadistill tokenize` writes"
            ) from None
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            value = "" if isinstance(first["input"], (dict, list, bytes)) else f", not {str(first['input'])[:80]!r}"
            if where == "version":
                raise UserError(
                    f"{path} has format version {first['input']!r}; this release reads version {FORMAT_VERSION}: "
                    "tokenize the text again with it, or use the release that wrote the data"
                ) from None
            raise UserError(f"{path} is not a valid manifest: {where}: {first['msg']}{value}: {again}") from None
        manifest._folder = path.resolve().parent
        return manifest

    def write(self, folder: Path) -> None:
        """Writes `folder`/manifest.json, whole or not at all. The last act of writing a split."""
        with _written_whole(folder / MANIFEST) as file:
            file.write((json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode())

    @property
    def folder(self) -> Path:
        """Where the manifest was loaded from; shard names are relative to it."""
        assert self._folder is not None, "this manifest was not loaded from a file"
        return self._folder

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer: tokenizer.model and the Hugging Face files."""
        return (self.folder.parent / self.tokenizer.file).parent

    @property
    def units(self) -> int:
        return sum(shard.units for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON: the same wherever the folder lies."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest dtype that holds every id."""
    return "uint16" if vocab_size <= UINT16_IDS else "uint32"


def refuse_finished(folder: Path) -> None:
    """Raises UserError where `folder` holds a manifest: a finished split is immutable."""
    if (folder / MANIFEST).exists():
        raise UserError(
            f"{folder / MANIFEST} exists, and a split is never changed: give another --output, or delete it"
        )


def write_shards(
    folder: Path, units: Iterable[NDArray[Any]], *, vocab_size: int, units_per_shard: int
) -> tuple[Shard, ...]:
    """Writes `units`, each [S + 1], as shards with their indices. The same units give the same bytes.

    Returns what the manifest says of them; the caller writes the manifest, last.

    Raises:
        UserError: `folder` holds a finished split.
    """
    refuse_finished(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    keyed = ((f"{number:010d}", unit.astype(dtype)) for number, unit in enumerate(units))
    shards: list[Shard] = []
    while (first := next(keyed, None)) is not None:
        members = itertools.chain([first], itertools.islice(keyed, units_per_shard - 1))
        shards.append(_write_shard(folder / f"shard-{len(shards):05d}.tar", members))
    return tuple(shards)


def _write_shard(path: Path, members: Iterable[tuple[str, Unit]]) -> Shard:
    with (
        _written_whole(path) as file,
        TarWriter(file, mtime=0) as tar,
    ):  # a real mtime adds a PAX header of 1 KB a member
        for key, unit in members:
            tar.write({"__key__": key, "tokens.npy": unit})
    rows_U3 = _index(path)
    index = path.with_name(f"{path.name}.idx.npy")
    with _written_whole(index) as file:
        np.save(file, rows_U3, allow_pickle=False)
    return Shard(
        name=path.name,
        units=len(rows_U3),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        index=index.name,
        index_sha256=file_sha256(index),
    )


def _index(path: Path) -> NDArray[np.int64]:
    """[U, 3]: byte offset, length and crc32 of each member's data, read back from the finished tar."""
    rows: list[tuple[int, int, int]] = []
    with tarfile.open(path) as tar:
        for member in tar:
            data = tar.extractfile(member)
            assert data is not None, f"{path} holds {member.name}, which is no file"
            rows.append((member.offset_data, member.size, zlib.crc32(data.read())))
    return np.array(rows, dtype=np.int64)


class ShardReader:
    """One shard of a manifest, mapped into memory and checked: size and index on opening, each unit when it is read."""

    def __init__(self, manifest: Manifest, number: int) -> None:
        """Opens shard `number`.

        Raises:
            ShardFault: a file is missing, the size or the index is not the manifest's.
        """
        shard = manifest.shards[number]
        self._path = manifest.folder / shard.name
        self._shape = (manifest.sequence_length + 1,)
        self._dtype = np.dtype(manifest.dtype)
        self._vocab_size = manifest.vocab_size
        try:
            self._index_U3 = _load_index(manifest.folder / shard.index, shard)
            with open(self._path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != shard.bytes:
                    raise ShardFault(f"{self._path}: expected {shard.bytes} bytes, found {size}")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ShardFault(f"{error.filename}: expected a readable file, found: {error.strerror}") from None

    def unit(self, number: int) -> Unit:
        """[S + 1]: unit `number` of the shard.

        Raises:
            ShardFault: the bytes are not those that were written, or they are no unit of this manifest.
        """
        offset, length, crc = self._index_U3[number].tolist()
        where = f"{self._path} unit {number} at byte {offset}"
        data = self._bytes[offset : offset + length]
        if zlib.crc32(data) != crc:
            raise ShardFault(f"{where}: expected crc32 {crc:#010x}, found {zlib.crc32(data):#010x}")
        try:
            stream = io.BytesIO(data)
            unit: Unit = np.lib.format.read_array(stream, allow_pickle=False)
        except ValueError as error:
            raise ShardFault(f"{where}: expected an .npy of plain numbers: {' '.join(str(error).split())}") from None
        if unit.dtype != self._dtype or unit.shape != self._shape or stream.read(1):
            raise ShardFault(f"{where}: expected {self._shape} {self._dtype}, found {unit.shape} {unit.dtype}")
        if unit.max() >= self._vocab_size:
            raise ShardFault(f"{where}: expected ids below {self._vocab_size}, found {unit.max()}")
        return unit


def _load_index(path: Path, shard: Shard) -> NDArray[np.int64]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ShardFault(f"{path}: expected the index with sha256 {shard.index_sha256[:12]}…, found another")
    try:
        rows_U3: NDArray[np.int64] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ShardFault(f"{path}: expected an .npy of plain numbers: {' '.join(str(error).split())}") from None
    if rows_U3.shape != (shard.units, 3) or rows_U3.dtype != np.int64:
        raise ShardFault(f"{path}: expected ({shard.units}, 3) int64, found {rows_U3.shape} {rows_U3.dtype}")
    inside = (rows_U3[:, :2] >= 0).all() and (rows_U3[:, 0] <= shard.bytes - rows_U3[:, 1]).all()
    if not inside:
        raise ShardFault(f"{path}: expected byte ranges inside the {shard.bytes} bytes of {shard.name}")
    return rows_U3


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that bears its name only once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
