"""The checkpoint format: safetensors files and a manifest, complete or invisible, readable without this package.

`checkpoints/step-00001000/` holds one safetensors file a rank (its piece of every flattened parameter's float32
master weights and optimizer state, see `student.state`) and `manifest.json` (step, stream cursor, shapes,
every file's size and sha256). The pieces of the ranks, one after the other, are the parameter, so that any number of
ranks can read what any number of ranks wrote; all but the last are equally long, so that a reader opens only the files
that hold its range. The rows of embedding and head past the true vocabulary are padding, which belongs to the layout of
the ranks that wrote them: a reader may have more of them, or fewer. No file is a pickle. `writer` writes checkpoints,
`select` chooses one.
"""

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megadistill.errors import OperatorFault, UserError
from megadistill.io import NotRegularError, file_sha256, parse_json, read_file, sync_folder, write_file
from megadistill.models.families import EMBEDDING, HEAD
from megadistill.redaction import printable
from megadistill.train.checkpoint.folders import MAX_MANIFEST_BYTES, checkpoint_folders, step_of

FORMAT = 2
RNG_KEY = "rng"


MAX_WORLD = 1 << 17
"""Ranks of a run."""
MAX_SLOT = 1 << 60
VOCABULARY_TABLES = (EMBEDDING, HEAD)
"""Parameters with a row for each id, and padding behind them."""

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


class AveragedCheckpoint(_Record):
    """A checkpoint that an average is made of."""

    step: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of its manifest."""
    weight: Annotated[float, Field(ge=0, le=1)]
    """Its weight in the sum."""


class AverageRecord(_Record):
    """The parts of an average of checkpoints, which has weights alone, without optimizer state."""

    kind: Literal["mean", "ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Decay of an exponential moving average, a checkpoint."""
    checkpoints: tuple[AveragedCheckpoint, ...]
    """Oldest first."""


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
    average: AverageRecord | None = None
    """Set for an average of checkpoints, whose other values are the newest one's; not written for a run's own."""
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
        """A step reads one sequence at least, and all sequences of a curriculum entry have as many tokens."""
        cursor = CursorRecord.model_validate_json(json.dumps(self.cursor))
        read, stages = cursor.read, cursor.order.get("stages")
        has_one_length = not isinstance(stages, list) or len(stages) < 2
        if not self.step <= read <= self.tokens or (read and has_one_length and self.tokens % read):
            raise ValueError(f"step {self.step:,}, {read:,} sequences and {self.tokens:,} tokens do not go together")
        return self


@dataclass(frozen=True)
class Range:
    """Elements `start` to `stop` of the piece of a flattened parameter that `rank` holds, of `length` elements."""

    rank: int
    start: int
    stop: int
    length: int


def ranges_of(numel: int, start: int, stop: int, world: int) -> Iterator[Range]:
    """Places of elements `start` to `stop` of a parameter of `numel`: each ZeRO-3 rank holds ceil(numel / world)."""
    size = max(1, -(-numel // world))
    for rank in range(start // size, -(-stop // size)):
        first = rank * size
        length = min(size, numel - first)
        yield Range(rank, max(start - first, 0), min(stop - first, length), length)


def range_of_rank(numel: int, rank: int, world: int) -> tuple[int, int]:
    """First element, and the one behind the last, of a rank's piece of a parameter of `numel`."""
    size = max(1, -(-numel // world))
    return min(rank * size, numel), min((rank + 1) * size, numel)


class Checkpoint:
    """A checkpoint on disk with a valid manifest. `verify` compares the files with it.

    `manifest`: its content, where another rank has read it.

    Raises:
        OperatorFault: the manifest is missing or damaged.
    """

    def __init__(self, folder: Path, manifest: CheckpointManifest | None = None) -> None:
        self.folder = folder
        self._open: dict[int, Any] = {}
        path = folder / "manifest.json"
        self.manifest = read_manifest(path) if manifest is None else manifest
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

        They are those that it reads its state from, as far as the numbers of ranks allow it.

        Raises:
            OperatorFault: a file is missing or damaged. OSError: a file cannot be read at the moment.
        """
        world = self.manifest.world
        for name in _rank_files(world)[part * world // parts : (part + 1) * world // parts]:
            record = self.manifest.files[name]
            path = self.folder / name
            if not path.is_file():
                raise OperatorFault(f"{path} is missing")
            actual = record_of(path)
            if actual != record:
                raise OperatorFault(
                    f"{path} is damaged: {actual.bytes} bytes with sha256 {actual.sha256[:12]}…, the manifest has "
                    f"{record.bytes} and {record.sha256[:12]}…"
                )

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor whose pieces the ranks hold under `key`: `master/NAME`.

        Only files that hold them are opened. What is no parameter's, such as the optimizer's step, each rank holds
        whole: it comes from a file that is open. Of embedding and head, elements past the stored rows are zeros: a
        reader's padding.

        Raises:
            OperatorFault: no rank holds the key, or its piece is not as long as the manifest says.
        """
        name = key.partition("/")[2]
        if not name:
            return self._slice(key, Range(next(iter(self._open), 0), start, stop, stop))
        shape = self.manifest.parameters.get(name)
        if shape is None:
            raise OperatorFault(f"{self.folder}: cannot read {key}: it has no such parameter")
        numel = math.prod(shape)
        if not 0 <= start <= stop or (stop > numel and name not in VOCABULARY_TABLES):
            raise OperatorFault(f"{self.folder}: {key} has {numel} elements, not {start} to {stop}")
        if start == stop:
            return torch.empty(0)
        end = min(stop, numel)
        stored = ranges_of(numel, start, end, self.manifest.world) if start < end else ()
        pieces = [self._slice(key, each) for each in stored]
        if stop > numel:
            pieces.append(torch.zeros(stop - max(start, numel)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _slice(self, key: str, place: Range) -> Tensor:
        path = self._path(place.rank)
        try:
            piece = self._file(place.rank).get_slice(key)
            shape = piece.get_shape()
            if shape != [place.length]:
                raise OperatorFault(f"{path}: {key} has the shape {shape}, its manifest says [{place.length}]")
            elements: Tensor = piece[place.start : place.stop]
        except (SafetensorError, FileNotFoundError) as error:
            raise OperatorFault(f"{path}: cannot read {key}: {error}") from None
        return elements

    def _path(self, rank: int) -> Path:
        return self.folder / rank_file(rank, self.manifest.world)

    def _file(self, rank: int) -> Any:
        """The open file of a rank: its header is read once."""
        if rank not in self._open:
            self._open[rank] = safe_open(self._path(rank), framework="pt")
        return self._open[rank]

    def parameter(self, name: str) -> Tensor:
        """The float32 master copy of a whole parameter, in its shape."""
        shape = self.manifest.parameters[name]
        return self.read(f"master/{name}", 0, torch.Size(shape).numel()).reshape(shape)

    def release(self) -> None:
        """Closes the files. They are memory-mapped, and count as this process's memory until then."""
        self._open.clear()

    def rng_state(self, rank: int, world: int) -> Tensor | None:
        """The rank's RNG state, or None when another number of ranks wrote this checkpoint."""
        if world != self.manifest.world:
            return None
        state: Tensor = self._file(rank).get_tensor(RNG_KEY)
        return state


def refuse_average(manifest: CheckpointManifest, folder: Path) -> None:
    """Refuses a checkpoint that is an average, which has no optimizer state for a run to continue with.

    Raises:
        UserError: it is one.
    """
    if manifest.average is not None:
        raise UserError(
            f"{printable(str(folder))} is an average of checkpoints, with weights and no optimizer state: no run can "
            f"resume from it or begin from it; export it (megadistill export {printable(str(folder))} --output DIR), "
            "and name DIR in student.weights"
        )


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
    write_manifest(temporary / "manifest.json", manifest.model_copy(update={"files": files}))
    for name in files:
        (temporary / f"{name}.json").unlink()
    sync_folder(temporary)
    temporary.rename(target)
    sync_folder(target.parent)


def write_manifest(path: Path, manifest: CheckpointManifest) -> None:
    """Writes a manifest with its own sha256. Raises OSError: the disk refuses it."""
    values = manifest.model_dump(mode="json")
    if manifest.average is None:
        del values["average"]  # an earlier version reads the checkpoints of a run
    values["sha256"] = _own_sha256(values)
    write_file(path, json.dumps(values, indent=1))


def read_manifest(path: Path) -> CheckpointManifest:
    """A checkpoint's manifest, compared with its own sha256.

    Raises:
        OperatorFault: it is missing or damaged. OSError: it cannot be read at the moment.
    """
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
