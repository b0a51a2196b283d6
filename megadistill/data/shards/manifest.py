"""The manifest: what one split of a data set holds, with the hashes that say so. It reads no shard.

A split is one folder: `manifest.json`, shards `shard-00000.tar` (plain WebDataset tars, a sample a unit), and beside
each its index `shard-00000.tar.idx.npy`. The manifest is written last: a folder without one is unfinished. It is
immutable, and carries the sha256 of its own content, so that an edit by hand is seen.

Legend: S tokens of a sequence; a unit has S + 1.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from megadistill.data.storage.base import Folder
from megadistill.data.storage.open import folder_of
from megadistill.errors import UserError
from megadistill.io import written_whole
from megadistill.redaction import shown

FORMAT_VERSION: Final = 2
MANIFEST = "manifest.json"
INDEX_SUFFIX = ".idx.npy"
MAX_MANIFEST_BYTES = 1 << 30
UINT16_IDS = 1 << 16

# One name or a path of names below the folder; no name begins with a dot, so none is "..".
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
FileName = Annotated[str, Field(pattern=rf"^{_NAME}$", max_length=200)]
NearbyPath = Annotated[str, Field(pattern=rf"^(\.\./)?{_NAME}(/{_NAME})*$", max_length=1000)]
"""Below the folder of the split, or below the folder that holds it."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 60)]
TokenId = Annotated[int, Field(ge=0, le=1 << 24)]

TokenDtype = Literal["uint16", "uint32"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))  # there may be 100,000 of them
class Shard:
    """One tar file; its index lies beside it, under the same name with `INDEX_SUFFIX`."""

    name: FileName
    units: Annotated[int, Field(ge=1, le=1 << 32)]
    bytes: Annotated[int, Field(ge=1, le=1 << 50)]
    sha256: Sha256
    index_sha256: Sha256

    @property
    def index(self) -> str:
        return self.name + INDEX_SUFFIX


class UnitRecord(_Record):
    """How a unit lies in its tar: the suffixes of its members, and what they hold."""

    kind: Literal["npy", "npz", "raw"]
    """npy: one array; npz: an archive with one array; raw: the tokens' bytes, little-endian, and nothing else."""
    tokens: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)]
    """The member with the tokens [S + 1], such as `tokens.npy`."""
    bounds: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)] | None
    """The member with the documents' bounds [D + 1] (see `packing`), such as `bounds.npy`; None: they are not known."""
    array: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)] | None = None
    """The array with the tokens, in an npz that holds several; None: it holds one."""


class TokenizerRecord(_Record):
    """The tokenizer that made the ids."""

    kind: Literal["sentencepiece", "huggingface"]
    file: NearbyPath
    """tokenizer.model or tokenizer.json, relative to the folder of the split."""
    sha256: Sha256
    """Of tokenizer.model; or of the canonical JSON of tokenizer.json (see `tokenizer`)."""


class PackerRecord(_Record):
    """How documents became units; what somebody else packed is `foreign`, a prompt and what follows it `generated`."""

    name: Literal["chunk", "bestfit", "foreign", "generated"]
    version: Annotated[int, Field(ge=1)]
    bos: TokenId | None
    """The id that stands before each document; None where there is none."""
    eos: TokenId | None
    """The id that stands after each document."""


class GeneratedRecord(_Record):
    """What decided the units that a teacher wrote: prompts from a stream, and what it says after each."""

    teacher: Sha256
    """`teacher_fingerprint` of its folder."""
    order: Sha256
    """Fingerprint of the prompts' stream."""
    first_slot: Annotated[int, Field(ge=0, le=1 << 60)]
    stop_slot: Annotated[int, Field(ge=1, le=1 << 60)]
    prompt_tokens: Annotated[int, Field(ge=1, le=1 << 24)]
    new_tokens: Annotated[int, Field(ge=1, le=1 << 24)]
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: int


class SourceRecord(_Record):
    """What the text was, in words: last names of the inputs, the patterns, the share of documents held out."""

    inputs: tuple[str, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    generated: GeneratedRecord | None = Field(default=None, exclude_if=lambda record: record is None)
    """None, and not written, where people wrote the text: the fingerprints of those manifests stay what they were."""


class Manifest(_Record):
    """One split of a data set. Immutable: its fingerprint is part of every position in its stream."""

    version: Literal[2]
    split: FileName
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    dtype: TokenDtype
    """Of the tokens in the shards."""
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    """The true number of ids, no padding."""
    unit: UnitRecord
    tokenizer: TokenizerRecord
    packer: PackerRecord
    documents: Count | None
    """None where the shards are somebody else's, who did not say."""
    tokens: Count
    """Tokens that are predicted: those of all units whose label is not ignored."""
    text_bytes: Annotated[int, Field(ge=1, le=1 << 60)] | None
    """UTF-8 bytes of those tokens' text: bits a byte = nats a token · tokens / (text_bytes · ln 2). None: not known."""
    source: SourceRecord
    shards: Annotated[tuple[Shard, ...], Field(min_length=1, max_length=1 << 24)]

    _folder: Folder | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Manifest":
        if self.packer.name != "foreign" and self.dtype != token_dtype(self.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not go with vocab_size {self.vocab_size}")
        if self.tokens > self.units * self.sequence_length:
            raise ValueError(
                f"tokens is {self.tokens}, but {self.units} units of {self.sequence_length} make "
                f"{self.units * self.sequence_length} at most"
            )
        names = [name for shard in self.shards for name in (shard.name, shard.index)]
        if len(set(names)) != len(names):
            raise ValueError("two shards or indices have the same name")
        return self

    @classmethod
    def load(cls, location: Path | str) -> "Manifest":
        """The manifest at `location`, a path or a URL of `.../manifest.json`.

        Raises:
            UserError: there is none, it was changed by hand, or it is not one that this version reads; one line.
        """
        again = "run `megadistill tokenize` again, or restore the file that it wrote"
        parent, _, name = str(location).rpartition("/")
        folder = folder_of(parent or ("/" if str(location).startswith("/") else "."))
        try:
            text = folder.read_whole(name, max_bytes=MAX_MANIFEST_BYTES)
        except OSError as error:
            raise UserError(
                f"{shown(location)} cannot be read ({error.strerror or error}): give the manifest.json of a split, "
                "which `megadistill tokenize` writes"
            ) from None
        return cls._parse(text, shown(location), again).lying_in(folder)

    @classmethod
    def _parse(cls, text: bytes, location: str, again: str) -> "Manifest":
        try:
            stored = _Stored.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            value = "" if isinstance(first["input"], (dict, list, bytes)) else f", not {str(first['input'])[:80]!r}"
            if where == "version":
                version = None if first["type"] == "missing" else first["input"]
                raise UserError(
                    f"{location} has format version {version!r}; this release reads version {FORMAT_VERSION}: "
                    "tokenize the text again with it, or use the release that wrote the data"
                ) from None
            raise UserError(f"{location} is not a valid manifest: {where}: {first['msg']}{value}: {again}") from None
        manifest = cls(**{name: getattr(stored, name) for name in cls.model_fields})
        if stored.sha256 != manifest.fingerprint:
            raise UserError(
                f"{location} was changed after it was written: its content has sha256 {manifest.fingerprint[:12]}…, "
                f"it says {stored.sha256[:12]}…; a manifest is immutable: {again}"
            )
        return manifest

    def lying_in(self, folder: Folder) -> "Manifest":
        """The same, with its shards in `folder`."""
        manifest = self.model_copy()
        manifest._folder = folder
        return manifest

    def write(self, folder: Path) -> None:
        """Writes `folder`/manifest.json, whole or not at all. The last act of writing a split."""
        stored = _Stored(sha256=self.fingerprint, **{name: getattr(self, name) for name in type(self).model_fields})
        with written_whole(folder / MANIFEST) as file:
            file.write(stored.model_dump_json(indent=1).encode() + b"\n")

    @property
    def folder(self) -> Folder:
        """Where the manifest was loaded from; shard names are relative to it."""
        assert self._folder is not None, "this manifest was not loaded from a file"
        return self._folder

    @cached_property
    def units(self) -> int:
        return sum(shard.units for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the JSON without white space, in the order of the fields: the same wherever the folder lies."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class _Stored(Manifest):
    """A manifest as it lies in its file."""

    sha256: Sha256
    """The fingerprint of the rest."""


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest dtype that holds every id."""
    return "uint16" if vocab_size <= UINT16_IDS else "uint32"


def refuse_finished(folder: Path) -> None:
    """Raises UserError where `folder` holds a manifest: a finished split is immutable."""
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder / MANIFEST} exists, and a split is never changed: give another folder, or delete it")
