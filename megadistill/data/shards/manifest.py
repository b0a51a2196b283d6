"""Manifests: the record of one split of a data set.

A split is one folder: `manifest.json`, shards `shard-00000.tar` (plain WebDataset tars, a sample a sequence), and
beside each its index `shard-00000.tar.idx.npy`. The manifest is written last: a folder without one is incomplete. It
lists up to MAX_LISTED shards itself (version 3); more are in a table beside it, `shards.npy` (version 4).

Legend: S tokens of a sequence, which is stored with S + 1; D documents of a sequence.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from megadistill.config.paths import wrong_path
from megadistill.data.shards.hashed_record import HashedRecord, Sha256
from megadistill.data.shards.shard import NAME, FileName
from megadistill.data.shards.shard_table import TABLE_FILE, ShardTable, TableRecord
from megadistill.data.storage.open import folder_of, refuse_secret
from megadistill.errors import UserError
from megadistill.redaction import redact_url

FORMAT_VERSION: Final = 3
MANIFEST: Final = "manifest.json"
TABLE_VERSION: Final = 4
"""Format version of a manifest.json whose shards are in a table."""
MAX_LISTED: Final = 10_000
"""Shards that manifest.json lists itself, in 2.5 MB; above that they are written as a table."""
MAX_TABLE_MANIFEST_BYTES: Final = 4 << 20
"""Limit of a manifest.json whose shards are in a table."""
UINT16_IDS = 1 << 16

NearbyPath = Annotated[str, Field(pattern=rf"^(\.\./)?{NAME}(/{NAME})*$", max_length=1000)]
"""A path below the folder of the split, or below its parent."""
Count = Annotated[int, Field(ge=0, le=1 << 60)]
TokenId = Annotated[int, Field(ge=0, le=1 << 24)]

DataFolder = Annotated[str, Field(pattern=rf"^(\.\./|(\.\./)?{NAME}(/{NAME})*)$", max_length=1000)]
"""The folder of token files: one below the folder of the split, its parent, or one below that."""

TokenDtype = Literal["uint16", "uint32"]
StoredDtype = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
"""Integers of a token file, little-endian."""
TokenFormatName = Literal["megatron", "olmo", "raw", "mds", "arrow", "parquet"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SampleFormat(_Record):
    """The sample of a sequence in its tar: the suffixes of its members, and what they hold."""

    kind: Literal["npy", "npz", "raw"]
    """npy: one array; npz: an archive with one array; raw: the tokens' bytes, little-endian, and nothing else."""
    tokens: Annotated[str, Field(pattern=rf"^{NAME}$", max_length=100)]
    """The member with the tokens [S + 1], such as `tokens.npy`."""
    bounds: Annotated[str, Field(pattern=rf"^{NAME}$", max_length=100)] | None
    """The member with the documents' bounds [D + 1] (see `labels`), such as `bounds.npy`; None: they are not known."""
    array: Annotated[str, Field(pattern=rf"^{NAME}$", max_length=100)] | None = None
    """The array with the tokens, in an npz that holds several; None: it holds one."""

    @property
    def has_documents(self) -> bool:
        """Whether the samples record where documents begin."""
        return self.bounds is not None


class DecoderRecord(_Record):
    """How the ids of a part of a token file are decoded, where they do not lie in it as they are."""

    kind: Literal["parquet"]
    column: Annotated[str, Field(min_length=1, max_length=200)]
    """The column or field with the ids."""


class TokenFileFormat(_Record):
    """Files of another program with streams of ids, which are read in place; the folder of the split has the indices.

    A sequence is S + 1 ids of a stream, and begins with the last id of the one before.
    """

    kind: Literal["token_file"]
    format: TokenFormatName
    folder: DataFolder
    """The folder of the files, relative to that of the split."""
    dtype: StoredDtype
    """dtype of the ids in the files."""
    has_documents: bool
    """Whether the indices record where documents begin."""
    segments: Annotated[int, Field(ge=1, le=1 << 40)]
    """Most segments of a file: the bound of the size of an index, with `documents`."""
    decoder: DecoderRecord | None = Field(default=None, exclude_if=lambda record: record is None)
    """None, and not written, where the ids lie in the files as they are."""


class TokenizerRecord(_Record):
    """The tokenizer that made the ids."""

    kind: Literal["sentencepiece", "huggingface"]
    file: NearbyPath
    """tokenizer.model or tokenizer.json, relative to the folder of the split."""
    sha256: Sha256
    """Hash of tokenizer.model, or of the canonical JSON of tokenizer.json (see `tokenizers`)."""
    files: dict[NearbyPath, Sha256] = Field(default_factory=dict, exclude_if=lambda files: not files)
    """Hash of the bytes of every file of the tokenizer, by its path in the folder of `file`; not written where there is
    none: manifests of earlier releases have no such record."""


class PackerRecord(_Record):
    """How documents became sequences; `external`: by another program; `generated`: a prompt and its continuation."""

    name: Literal["chunk", "bestfit", "external", "generated"]
    version: Annotated[int, Field(ge=1)]
    bos: TokenId | None
    """The id that the tokenizer puts before each document; None where it puts none, or it is not known."""
    eos: TokenId | None
    """The id that stands after each document."""
    sequence_bos: bool = Field(default=False, exclude_if=lambda holds: not holds)
    """Whether every sequence begins with `bos`; chunked sequences then share no token. Not written where it is false:
    manifests of earlier releases have no such record."""

    @model_validator(mode="after")
    def _has_bos(self) -> "PackerRecord":
        if self.sequence_bos and self.bos is None:
            raise ValueError("sequence_bos is true, and bos is not recorded")
        return self

    @property
    def across_documents(self) -> bool:
        """Whether the first token of a document is predicted from the document before it, without document masks."""
        return self.name != "bestfit"


class GeneratedRecord(_Record):
    """How a teacher generated the sequences: prompts from a stream, and the sampling of what follows each."""

    teacher: Sha256
    """`teacher_fingerprint` of its folder."""
    order: Sha256
    """Fingerprint of the prompts' stream."""
    insert_bos: bool = Field(default=False, exclude_if=lambda holds: not holds)
    """Whether BOS was put in front of the prompts' sequences. Not written where it is false."""
    first_slot: Annotated[int, Field(ge=0, le=1 << 60)]
    stop_slot: Annotated[int, Field(ge=1, le=1 << 60)]
    prompt_tokens: Annotated[int, Field(ge=1, le=1 << 24)]
    new_tokens: Annotated[int, Field(ge=1, le=1 << 24)]
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: int


class SourceRecord(_Record):
    """The origin of the text: names of the inputs without their folders, the patterns, the share held out."""

    inputs: tuple[str, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    generated: GeneratedRecord | None = Field(default=None, exclude_if=lambda record: record is None)
    """None, and not written, where the text was not generated."""


class _ManifestFields(HashedRecord):
    """The fields of a manifest besides its shards."""

    FILE: ClassVar[str] = MANIFEST
    TITLE: ClassVar[str] = "manifest"
    VERSION: ClassVar[str] = f"{FORMAT_VERSION} or {TABLE_VERSION}"
    LOCATION: ClassVar[str] = "the manifest.json of a split, which `megadistill tokenize` writes"
    WAY_OUT: ClassVar[str] = "run `megadistill tokenize` (or `megadistill shards index`)"

    version: int
    split: FileName
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    """S, in tokens."""
    dtype: TokenDtype
    """dtype of the tokens in the shards."""
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    """Number of ids of the tokenizer, without padding."""
    largest_id: TokenId | None = Field(default=None, exclude_if=lambda id: id is None)
    """The largest id in the shards; None, and not written, where it is not recorded, as by earlier releases."""
    sample_format: Annotated[SampleFormat | TokenFileFormat, Field(discriminator="kind")]
    tokenizer: TokenizerRecord
    packer: PackerRecord
    documents: Count | None
    """Number of documents; None: not known."""
    tokens: Count
    """Number of predicted tokens: labels that are not ignored."""
    text_bytes: Annotated[int, Field(ge=1, le=1 << 60)] | None
    """UTF-8 bytes of those tokens' text: bits a byte = nats a token · tokens / (text_bytes · ln 2). None: not known."""
    source: SourceRecord


class _TableManifest(_ManifestFields):
    """A manifest.json whose shards are in a table beside it."""

    version: Literal[4]
    shards: TableRecord
    content_sha256: Sha256
    """The fingerprint of the split: the sha256 of the manifest that lists the same shards itself."""


class Manifest(_ManifestFields):
    """The record of one split. Immutable: its fingerprint is part of every position in its stream.

    It is the same in memory, with the same fingerprint, whether its file lists the shards or a table holds them.
    """

    version: Literal[3]
    shards: ShardTable

    _recorded_fingerprint: Sha256 | None = PrivateAttr(default=None)
    """The fingerprint that a manifest.json with a table records."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Manifest":
        if self.packer.name != "external" and self.dtype != token_dtype(self.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not go with vocab_size {self.vocab_size}")
        record = self.sample_format
        if isinstance(record, TokenFileFormat) and self.dtype != read_dtype(record.dtype):
            raise ValueError(f"dtype {self.dtype} does not go with ids that are stored as {record.dtype}")
        if self.largest_id is not None and self.largest_id >= self.vocab_size:
            raise ValueError(f"largest_id is {self.largest_id}, but vocab_size {self.vocab_size}")
        most = self.sequences * self.sequence_length
        if self.tokens > most:
            raise ValueError(
                f"tokens is {self.tokens}, but {self.sequences} sequences of {self.sequence_length} make {most} at most"
            )
        return self

    @classmethod
    def load(cls, location: Path | str) -> "Manifest":
        """The manifest at `location`, a path or a URL of `.../manifest.json`.

        Raises:
            UserError: there is none, it was changed by hand, it has another format version, its table is missing or
                another one, or a URL has a secret.
        """
        if "://" not in str(location) and not Path(location).is_file():
            reason = wrong_path(location, "manifest")
            if reason is not None:
                raise UserError(reason)
        refuse_secret(str(location))
        parent, _, name = str(location).rpartition("/")
        folder = folder_of(parent or ("/" if str(location).startswith("/") else "."))
        where = redact_url(location)
        text = cls._text(folder, name, where)
        if len(text) <= MAX_TABLE_MANIFEST_BYTES and _is_of_table(text):
            return cls._with_table(_TableManifest._parsed(text, folder, where), where)
        return cls._parsed(text, folder, where)

    @classmethod
    def _with_table(cls, stored: _TableManifest, where: str) -> "Manifest":
        table = ShardTable.read(stored.folder, stored.shards, where)
        fields = {name: getattr(stored, name) for name in _ManifestFields.model_fields}
        try:
            manifest = cls(**{**fields, "version": FORMAT_VERSION, "shards": table})
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"{where} is not a valid {cls.TITLE}: {reason}: {cls.WAY_OUT} again") from None
        manifest._recorded_fingerprint = stored.content_sha256
        return manifest.lying_in(stored.folder)

    def write(self, folder: Path, *, table: bool | None = None) -> None:
        """Writes the manifest into `folder`, whole or not at all: the last file that is written there.

        `table`: whether its shards are written as a table; None: if they are more than MAX_LISTED.
        """
        if not (len(self.shards) > MAX_LISTED if table is None else table):
            super().write(folder)
            (folder / TABLE_FILE).unlink(missing_ok=True)
            return
        fields = {name: getattr(self, name) for name in _ManifestFields.model_fields}
        fields |= {"version": TABLE_VERSION, "shards": self.shards.write(folder), "content_sha256": self.fingerprint}
        _TableManifest(**fields).write(folder)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the JSON without white space that lists all shards, in the order of the fields: the same wherever
        the folder lies, and in both forms of the file. A recorded one is believed here: `shards verify` compares it."""
        return self._recorded_fingerprint or self.content_sha256()

    def content_sha256(self) -> str:
        """The fingerprint, computed from all shards."""
        digest = hashlib.sha256(self.model_dump_json(exclude={"shards"}).removesuffix("}").encode())
        digest.update(b',"shards":')
        for part in self.shards.json_parts():
            digest.update(part.encode())
        digest.update(b"}")
        return digest.hexdigest()

    @property
    def has_table(self) -> bool:
        """Whether the file that it was loaded from has its shards in a table."""
        return self._recorded_fingerprint is not None

    @property
    def predicts_every_label(self) -> bool:
        """Whether every label is predicted without document masks: no sequence has padding."""
        return self.packer.name == "chunk" or isinstance(self.sample_format, TokenFileFormat)

    @cached_property
    def sequences(self) -> int:
        """Number of sequences in all shards."""
        return int(self.shards.sequences.sum())

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return int(self.shards.bytes.sum())


class _Version(BaseModel):
    version: int


def _is_of_table(text: bytes) -> bool:
    """Whether the text of a manifest.json says that its shards are in a table."""
    try:
        return _Version.model_validate_json(text).version == TABLE_VERSION
    except ValidationError:
        return False


def read_dtype(stored: StoredDtype) -> TokenDtype:
    """The dtype in which ids of a token file are read."""
    return "uint16" if stored in ("uint8", "int8", "uint16", "int16") else "uint32"


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest dtype that holds every id."""
    return "uint16" if vocab_size <= UINT16_IDS else "uint32"
