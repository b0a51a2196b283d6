"""The checkpoint format: safetensors files and a manifest, complete or invisible, readable without this package.

`checkpoints/step-00001000/` holds one safetensors file a rank (its piece of every flattened parameter's float32
master weights and optimizer state, see `student.state`) and `manifest.json` (step, stream cursor, shapes,
every file's size and sha256). The pieces of the ranks, one after the other, are the parameter, so that any number of
ranks can read what any number of ranks wrote. No file is a pickle. `writer` writes checkpoints, `select` chooses one.
"""

import hashlib
import json
import math
import os
import reprlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megadistill.errors import OperatorFault
from megadistill.io import NotRegularError, file_sha256, parse_json, read_file, sync_folder, write_file
from megadistill.redaction import printable
from megadistill.train.checkpoint.folders import MAX_MANIFEST_BYTES, checkpoint_folders, step_of

FORMAT = 2
RNG_KEY = "rng"


MAX_WORLD = 1 << 17
"""Ranks of a run."""
MAX_SLOT = 1 << 60

Count = Annotated[int, Field(ge=0, le=MAX_SLOT)]
Dimension = Annotated[int, Field(ge=0, le=1 << 40)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    bytes: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ParentRecord(_Record):
    """A checkpoint of another run, from which a run began."""

    run: str
    """Name of its run folder."""
    step: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of its manifest."""


class CursorRecord(_Record):
    """A position in the token stream, as `Cursor.state` gives it."""

    fingerprint: str
    next_slot: Count
    masked_slots: tuple[Count, ...]
    skips: tuple[tuple[Count, Count], ...]
    order: dict[str, Any]

    @property
    def read(self) -> int:
        """Number of slots before `next_slot` that were read."""
        skipped = sum(max(0, min(stop, self.next_slot) - start) for start, stop in self.skips)
        return self.next_slot - skipped


class CheckpointManifest(_Record):
    """The content of manifest.json."""

    format: int
    step: Count
    tokens: Count
    world: int = Field(ge=1, le=MAX_WORLD)
    vocab_size: int = Field(ge=1, le=1 << 24)
    """Ids of the tokenizer; the rows past them are padding."""
    cursor: dict[str, Any]
    """See `CursorRecord`."""
    parameters: dict[str, Annotated[tuple[Dimension, ...], Field(max_length=8)]]
    versions: dict[str, str]
    attempt: Count = 0
    """The attempt that wrote the checkpoint; 0: not known."""
    recipe: dict[str, Any] = {}
    recipe_sha256: str = ""
    rollbacks: Count = 0
    """Rollbacks of the run before this checkpoint."""
    parents: tuple[ParentRecord, ...] = ()
    """Checkpoints of other runs from which this run began, and theirs, oldest first."""
    files: dict[str, FileRecord]
    sha256: str = ""
    """sha256 of the manifest's other values, see `_own_sha256`."""

    @field_validator("parameters")
    @classmethod
    def _can_be_counted(cls, parameters: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for name, shape in parameters.items():
            if math.prod(shape) > MAX_SLOT:
                raise ValueError(f"{name!r} has {math.prod(shape):,} elements")
        return parameters

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "CheckpointManifest":
        """A step reads one sequence at least, and all sequences have the same number of tokens."""
        read = CursorRecord.model_validate_json(json.dumps(self.cursor)).read
        if not self.step <= read <= self.tokens or (read and self.tokens % read):
            raise ValueError(f"step {self.step:,}, {read:,} sequences and {self.tokens:,} tokens do not go together")
        return self


class Checkpoint:
    """A checkpoint on disk with a valid manifest. `verify` compares the files with it.

    Raises:
        OperatorFault: the manifest is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        self.manifest = _read_manifest(path)
        step = step_of(folder.name)
        if step not in (None, self.manifest.step):
            raise OperatorFault(f"{path} is of step {self.manifest.step}, not of the folder's step {step}")
        world, names = self.manifest.world, self.manifest.files
        if len(names) != world or sorted(names) != _rank_files(world):
            raise OperatorFault(
                f"{path}: lists {len(self.manifest.files)} files, but {self.manifest.world} ranks wrote it"
            )

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares each file's size and sha256 with the manifest. Rank `part` of `parts` reads its share of the files.

        Raises:
            OperatorFault: a file is missing or damaged. OSError: a file cannot be read at the moment.
        """
        for name, record in list(self.manifest.files.items())[part::parts]:
            path = self.folder / name
            if not path.is_file():
                raise OperatorFault(f"{path} is missing")
            actual = record_of(path)
            if actual != record:
                raise OperatorFault(
                    f"{path} is damaged: {actual.bytes} bytes with sha256 {actual.sha256[:12]}…, the manifest has "
                    f"{record.bytes} and {record.sha256[:12]}…"
                )

    @cached_property
    def _files(self) -> list[Any]:
        return [safe_open(self.folder / name, framework="pt") for name in _rank_files(self.manifest.world)]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor whose pieces the ranks hold under `key`.

        Raises:
            OperatorFault: no rank holds the key, or the pieces end before `stop`.
        """
        pieces, offset = [], 0
        try:
            for file in self._files:
                piece = file.get_slice(key)
                length = piece.get_shape()[0]
                first, last = max(start - offset, 0), min(stop - offset, length)
                if first < last:
                    pieces.append(piece[first:last])
                offset += length
        except (SafetensorError, IndexError) as error:  # or a scalar
            raise OperatorFault(f"{self.folder}: cannot read {key}: {error}") from None
        elements = torch.cat(pieces) if pieces else torch.empty(0)
        if elements.numel() != stop - start:
            raise OperatorFault(f"{self.folder}: {key} has {offset} elements, not {start} to {stop}")
        return elements

    def parameter(self, name: str) -> Tensor:
        """The float32 master copy of a whole parameter, in its shape."""
        shape = self.manifest.parameters[name]
        return self.read(f"master/{name}", 0, torch.Size(shape).numel()).reshape(shape)

    def release(self) -> None:
        """Closes the files. They are memory-mapped, and count as this process's memory until then."""
        self.__dict__.pop("_files", None)

    def rng_state(self, rank: int, world: int) -> Tensor | None:
        """The rank's RNG state, or None when another number of ranks wrote this checkpoint."""
        if world != self.manifest.world:
            return None
        state: Tensor = self._files[rank].get_tensor(RNG_KEY)
        return state


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint below `folder`, or None where there is none. For readers, which quarantine nothing.

    Raises:
        OperatorFault: the manifest of the newest is missing or damaged. An older one is not taken silently.
    """
    folders = checkpoint_folders(folder)
    return Checkpoint(folders[max(folders)]) if folders else None


def write_rank(folder: Path, state: dict[str, Tensor], *, rank: int, world: int) -> FileRecord:
    """Writes this rank's file durably, and its size and hash beside it.

    Raises:
        OSError, SafetensorError: the disk refuses it.
    """
    name = rank_file(rank, world)
    save_file(state, folder / name)
    (folder / name).chmod(0o644)  # safetensors makes files that only their owner can read
    with open(folder / name, "rb") as file:
        os.fsync(file.fileno())
    record = record_of(folder / name)
    write_file(folder / f"{name}.json", record.model_dump_json())
    return record


def commit(temporary: Path, target: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest with every rank's record, then renames the folder, which makes the checkpoint visible.

    Raises:
        OSError: the disk refuses it, or `target` exists.
    """
    files = {}
    for name in _rank_files(manifest.world):
        files[name] = FileRecord.model_validate_json(read_file(temporary / f"{name}.json"))
    values = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    values["sha256"] = _own_sha256(values)
    write_file(temporary / "manifest.json", json.dumps(values, indent=1))
    for name in files:
        (temporary / f"{name}.json").unlink()
    sync_folder(temporary)
    temporary.rename(target)
    sync_folder(target.parent)


def _read_manifest(path: Path) -> CheckpointManifest:
    try:
        content = read_file(path, max_bytes=MAX_MANIFEST_BYTES)
        values = parse_json(content)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        if type(version := values.get("format")) is not int or version != FORMAT:  # before its keys
            raise OperatorFault(f"{path}: format {reprlib.repr(version)}, this version reads {FORMAT}")
        if values.get("sha256") != _own_sha256(values):
            raise OperatorFault(f"{path} is damaged: its values do not have the sha256 that it records")
        return CheckpointManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = printable(" ".join(f"{place}: {first['msg']}"[:300].split()))
        raise OperatorFault(f"{path} is not a checkpoint manifest: {reason}") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, NotRegularError, ValueError) as error:
        raise OperatorFault(f"{path} is not a checkpoint manifest ({str(error).splitlines()[0]})") from None


def _own_sha256(values: dict[str, Any]) -> str:
    canonical = json.dumps({key: value for key, value in values.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def rank_file(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def _rank_files(world: int) -> list[str]:
    return [rank_file(rank, world) for rank in range(world)]


def record_of(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))
