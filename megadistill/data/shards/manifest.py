"""Manifests: the record of one split of a data set.

A split is one folder: `manifest.json`, shards `shard-00000.tar` (plain WebDataset tars, a sample a sequence), and
beside each its index `shard-00000.tar.idx.npy`. The manifest is written last: a folder without one is incomplete.

Legend: S tokens of a sequence, which is stored with S + 1; D documents of a sequence.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from megadistill.config.paths import wrong_path
from megadistill.data.shards.hashed_record import HashedRecord, Sha256
from megadistill.data.storage.open import folder_of, refuse_secret
from megadistill.errors import UserError
from megadistill.redaction import redact_url

FORMAT_VERSION: Final = 3
MANIFEST: Final = "manifest.json"
INDEX_SUFFIX = ".idx.npy"
UINT16_IDS = 1 << 16

# One name or a path of names below the folder; no name begins with a dot, so none is "..".
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
FileName = Annotated[str, Field(pattern=rf"^{_NAME}$", max_length=200)]
NearbyPath = Annotated[str, Field(pattern=rf"^(\.\./)?{_NAME}(/{_NAME})*$", max_length=1000)]
"""A path below the folder of the split, or below its parent."""
Count = Annotated[int, Field(ge=0, le=1 << 60)]
TokenId = Annotated[int, Field(ge=0, le=1 << 24)]

TokenDtype = Literal["uint16", "uint32"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))  # there may be 100,000 of them
class Shard:
    """One tar file; its index lies beside it, under the same name with `INDEX_SUFFIX`."""

    name: FileName
    sequences: Annotated[int, Field(ge=1, le=1 << 32)]
    bytes: Annotated[int, Field(ge=1, le=1 << 50)]
    sha256: Sha256
    index_sha256: Sha256

    @property
    def index(self) -> str:
        return self.name + INDEX_SUFFIX


class SampleFormat(_Record):
    """The sample of a sequence in its tar: the suffixes of its members, and what they hold."""

    kind: Literal["npy", "npz", "raw"]
    """npy: one array; npz: an archive with one array; raw: the tokens' bytes, little-endian, and nothing else."""
    tokens: Annotated[str, Field(pattern=rf"^{_NAME}$", max_length=100)]
    """The member with the tokens [S + 1], such as `tokens.npy`."""
    bounds: Annotated[str, Field(pattern=rf"^{_NAME}$", max_length=100)] | None
    """The member with the documents' bounds [D + 1] (see `labels`), such as `bounds.npy`; None: they are not known."""
    array: Annotated[str, Field(pattern=rf"^{_NAME}$", max_length=100)] | None = None
    """The array with the tokens, in an npz that holds several; None: it holds one."""


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


class Manifest(HashedRecord):
    """The record of one split. Immutable: its fingerprint is part of every position in its stream."""

    FILE: ClassVar[str] = MANIFEST
    TITLE: ClassVar[str] = "manifest"
    VERSION: ClassVar[int] = FORMAT_VERSION
    LOCATION: ClassVar[str] = "the manifest.json of a split, which `megadistill tokenize` writes"
    WAY_OUT: ClassVar[str] = "run `megadistill tokenize` (or `megadistill shards index`)"

    version: Literal[3]
    split: FileName
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    """S, in tokens."""
    dtype: TokenDtype
    """dtype of the tokens in the shards."""
    vocab_size: Annotated[int, Field(ge=2, le=1 << 24)]
    """Number of ids of the tokenizer, without padding."""
    largest_id: TokenId | None = Field(default=None, exclude_if=lambda id: id is None)
    """The largest id in the shards; None, and not written, where it is not recorded, as by earlier releases."""
    sample_format: SampleFormat
    tokenizer: TokenizerRecord
    packer: PackerRecord
    documents: Count | None
    """Number of documents; None: not known."""
    tokens: Count
    """Number of predicted tokens: labels that are not ignored."""
    text_bytes: Annotated[int, Field(ge=1, le=1 << 60)] | None
    """UTF-8 bytes of those tokens' text: bits a byte = nats a token · tokens / (text_bytes · ln 2). None: not known."""
    source: SourceRecord
    shards: Annotated[tuple[Shard, ...], Field(min_length=1, max_length=1 << 24)]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Manifest":
        if self.packer.name != "external" and self.dtype != token_dtype(self.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not go with vocab_size {self.vocab_size}")
        if self.largest_id is not None and self.largest_id >= self.vocab_size:
            raise ValueError(f"largest_id is {self.largest_id}, but vocab_size {self.vocab_size}")
        most = self.sequences * self.sequence_length
        if self.tokens > most:
            raise ValueError(
                f"tokens is {self.tokens}, but {self.sequences} sequences of {self.sequence_length} make {most} at most"
            )
        names = [name for shard in self.shards for name in (shard.name, shard.index)]
        if len(set(names)) != len(names):
            raise ValueError("two shards or indices have the same name")
        return self

    @classmethod
    def load(cls, location: Path | str) -> "Manifest":
        """The manifest at `location`, a path or a URL of `.../manifest.json`.

        Raises:
            UserError: there is none, it was changed by hand, it has another format version, or a URL has a secret.
        """
        if "://" not in str(location) and not Path(location).is_file():
            reason = wrong_path(location, "manifest")
            if reason is not None:
                raise UserError(reason)
        refuse_secret(str(location))
        parent, _, name = str(location).rpartition("/")
        folder = folder_of(parent or ("/" if str(location).startswith("/") else "."))
        return cls._read(folder, name, redact_url(location))

    @cached_property
    def sequences(self) -> int:
        """Number of sequences in all shards."""
        return sum(shard.sequences for shard in self.shards)


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest dtype that holds every id."""
    return "uint16" if vocab_size <= UINT16_IDS else "uint32"
