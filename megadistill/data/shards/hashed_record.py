"""Immutable records: JSON files that carry the sha256 of their own content, so that an edit is refused."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from megadistill.data.storage.base import Folder
from megadistill.errors import UserError
from megadistill.io import write_file

MAX_RECORD_BYTES = 1 << 27
"""A shard takes 300 bytes of a manifest."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class HashedRecord(BaseModel):
    """A record of what lies in its folder; a subclass has a field `version` and the class variables."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    FILE: ClassVar[str]
    """Name of the file in its folder."""
    TITLE: ClassVar[str]
    """The kind of record, for messages."""
    VERSION: ClassVar[str]
    """The format version that this release reads, for messages."""
    LOCATION: ClassVar[str]
    """The kind of path that locates a record, for messages."""
    WAY_OUT: ClassVar[str]
    """How to make the record again, for messages."""

    sha256: Sha256 | None = Field(default=None, exclude=True)
    """The fingerprint, as the file has it; None in memory."""

    _folder: Folder | None = PrivateAttr(default=None)

    @classmethod
    def _read(cls, folder: Folder, name: str, where: str) -> Self:
        """The record in the file `name`, whose location is `where`.

        Raises:
            UserError: there is none, it was changed by hand, or it has another format version; one line.
        """
        return cls._parsed(cls._text(folder, name, where), folder, where)

    @classmethod
    def _text(cls, folder: Folder, name: str, where: str) -> bytes:
        """Raises UserError: the file cannot be read; one line."""
        try:
            return folder.read_whole(name, max_bytes=MAX_RECORD_BYTES)
        except FileNotFoundError:
            here = "" if "://" in where else f" (paths are relative to {Path.cwd()})"
            raise UserError(f"{where} does not exist{here}: give {cls.LOCATION}") from None
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror or error}): give {cls.LOCATION}") from None

    @classmethod
    def _parsed(cls, text: bytes, folder: Folder, where: str) -> Self:
        """Raises UserError: it was changed by hand, or it has another format version; one line."""
        way_out = f"{cls.WAY_OUT} again, or restore it"
        try:
            stored = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            value = "" if isinstance(first["input"], (dict, list, bytes)) else f", not {str(first['input'])[:80]!r}"
            if field == "version":
                version = None if first["type"] == "missing" else first["input"]
                raise UserError(
                    f"{where} has format version {version!r}; this release reads version {cls.VERSION}: "
                    f"{cls.WAY_OUT} again, or use the release that wrote it"
                ) from None
            raise UserError(f"{where} is not a valid {cls.TITLE}: {field}: {first['msg']}{value}: {way_out}") from None
        if stored.sha256 != stored.fingerprint:
            raise UserError(
                f"{where} was changed after it was written: its content has sha256 {stored.fingerprint[:12]}…, it "
                f"records {(stored.sha256 or 'none')[:12]}…; a {cls.TITLE} is immutable: {way_out}"
            )
        return stored.model_copy(update={"sha256": None}).lying_in(folder)

    def lying_in(self, folder: Folder) -> Self:
        """The same record, with its shards in `folder`."""
        record = self.model_copy()
        record._folder = folder
        return record

    def write(self, folder: Path) -> None:
        """Writes the record's file into `folder`, whole or not at all: the last file that is written there.

        Raises:
            UserError: it would be larger than what is read again.
        """
        values: dict[str, Any] = {**self.model_dump(mode="json"), "sha256": self.fingerprint}
        content = json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n"
        if len(content) > MAX_RECORD_BYTES:
            raise UserError(
                f"{folder / self.FILE} would have {len(content):,} bytes, more than the {MAX_RECORD_BYTES:,} that are "
                f"read: a {self.TITLE} cannot list so many shards"
            )
        write_file(folder / self.FILE, content)

    @classmethod
    def refuse_finished(cls, folder: Path) -> None:
        """Raises UserError where `folder` already holds a record of this kind."""
        if (folder / cls.FILE).exists():
            raise UserError(
                f"{folder / cls.FILE} exists, and a {cls.TITLE} is never changed: give another folder, or delete it"
            )

    @property
    def folder(self) -> Folder:
        """The folder that the record was loaded from; shard names are relative to it."""
        assert self._folder is not None, f"this {self.TITLE} was not loaded from a file"
        return self._folder

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the JSON without white space, in the order of the fields: the same wherever the folder lies."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
