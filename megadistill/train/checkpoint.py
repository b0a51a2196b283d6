"""Checkpoints: complete or invisible, and readable without this package. It knows no engine.

`checkpoints/step-00001000/` holds one safetensors file a rank (its piece of every flattened parameter's float32
master copy and AdamW moments, see `student.engine.local_state`) and `manifest.json` (step, stream cursor, shapes,
every file's size and sha256). The pieces of the ranks, one after the other, are the parameter, so that any number of
ranks can read what any number of ranks wrote. No file here is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megadistill.comm.collectives import everywhere
from megadistill.comm.topology import Topology
from megadistill.errors import OperatorFault, RestartFault

FORMAT = 1
RNG_KEY = "rng"
MAX_MANIFEST_BYTES = 64 << 20


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class CheckpointManifest(BaseModel):
    """What a checkpoint says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    world: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    """True ids; the rows past them are padding."""
    cursor: dict[str, Any]
    parameters: dict[str, tuple[int, ...]]
    versions: dict[str, str]
    files: dict[str, FileRecord]


class Checkpoint:
    """A checkpoint on disk whose manifest, sizes and hashes hold.

    Raises:
        OperatorFault: a file is missing, has another size or other bytes than the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        self.manifest = _read_manifest(path)
        expected = [_rank_file(rank, self.manifest.world) for rank in range(self.manifest.world)]
        if sorted(self.manifest.files) != expected:
            raise OperatorFault(f"{path}: lists {len(self.manifest.files)} files, {self.manifest.world} ranks wrote it")

    def verify(self) -> None:
        """Reads every file once and compares it with the manifest."""
        for name, record in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise OperatorFault(f"{path} is missing: move {self.folder} away to go on from an older checkpoint")
            found = _record(path)
            if found != record:
                raise OperatorFault(
                    f"{path} is damaged: {found.bytes} bytes with sha256 {found.sha256[:12]}…, the manifest says "
                    f"{record.bytes} and {record.sha256[:12]}…; move {self.folder} away to go on from an older one"
                )

    @cached_property
    def _files(self) -> list[Any]:
        names = [_rank_file(rank, self.manifest.world) for rank in range(self.manifest.world)]
        return [safe_open(self.folder / name, framework="pt") for name in names]

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
        except SafetensorError as error:
            raise OperatorFault(f"{self.folder}: cannot read {key}: {error}") from None
        found = torch.cat(pieces) if pieces else torch.empty(0)
        if found.numel() != stop - start:
            raise OperatorFault(f"{self.folder}: {key} has {offset} elements, asked for {start} to {stop}")
        return found

    def parameter(self, name: str) -> Tensor:
        """The float32 master copy of a whole parameter, in its shape."""
        shape = self.manifest.parameters[name]
        return self.read(f"master/{name}", 0, torch.Size(shape).numel()).reshape(shape)

    def rng_state(self, rank: int, world: int) -> Tensor | None:
        """The rank's RNG state, or None when another number of ranks wrote this checkpoint."""
        if world != self.manifest.world:
            return None
        state: Tensor = self._files[rank].get_tensor(RNG_KEY)
        return state


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint below `folder`, oldest first. What never got its name is not one."""
    named = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(name[1]), path) for name, path in named if name))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint below `folder`, or None where there is none.

    Raises:
        OperatorFault: the newest is damaged, be it that its manifest is gone. A run never goes on from something older
            in silence.
    """
    found = checkpoint_folders(folder)
    return Checkpoint(found[max(found)]) if found else None


def save_checkpoint(
    folder: Path,
    state: dict[str, Tensor],
    *,
    step: int,
    tokens: int,
    vocab_size: int,
    cursor: dict[str, Any],
    parameters: dict[str, tuple[int, ...]],
    versions: dict[str, str],
    topology: Topology,
) -> Path:
    """Writes this rank's `state`; the checkpoint appears under its name once every rank's file is durable. Collective.

    Raises:
        RestartFault: some rank could not write (a full disk); older checkpoints are as they were.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-step-{step:08d}"

    def manifest_of(files: dict[str, FileRecord]) -> CheckpointManifest:
        return CheckpointManifest(
            format=FORMAT,
            step=step,
            tokens=tokens,
            world=topology.world,
            vocab_size=vocab_size,
            cursor=cursor,
            parameters=parameters,
            versions=versions,
            files=files,
        )

    def on_first(work: Callable[[], None]) -> Callable[[], None]:
        return work if topology.is_first else lambda: None

    _all_or_none(on_first(lambda: _make_empty(temporary)), step, topology)
    _all_or_none(lambda: _write_rank(temporary, state, topology), step, topology)
    _all_or_none(on_first(lambda: _commit(temporary, target, manifest_of, topology.world)), step, topology)
    return target


def _all_or_none(work: Callable[[], None], step: int, topology: Topology) -> None:
    """`work` on every rank; a rank that cannot write fails all of them, after all of them tried. Collective."""
    problem = None
    try:
        work()
    except (OSError, SafetensorError) as error:
        problem = f"rank {topology.rank}: {error}"
    if not everywhere(problem is None, topology.device, topology.world_group):
        raise RestartFault(f"the checkpoint of step {step} was not written: {problem or 'another rank says why'}")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_rank(temporary: Path, state: dict[str, Tensor], topology: Topology) -> None:
    """This rank's file, durable, and its size and hash beside it."""
    name = _rank_file(topology.rank, topology.world)
    save_file(state, temporary / name)
    (temporary / name).chmod(0o644)  # safetensors makes files that nobody else can read
    with open(temporary / name, "rb") as file:
        os.fsync(file.fileno())
    _write_durably(temporary / f"{name}.json", _record(temporary / name).model_dump_json().encode())


def _commit(
    temporary: Path, target: Path, manifest_of: Callable[[dict[str, FileRecord]], CheckpointManifest], world: int
) -> None:
    """The manifest, then the name: the one instant at which the checkpoint comes to be."""
    files = {}
    for name in (_rank_file(rank, world) for rank in range(world)):
        files[name] = FileRecord.model_validate_json((temporary / f"{name}.json").read_bytes())
        (temporary / f"{name}.json").unlink()
    _write_durably(temporary / "manifest.json", manifest_of(files).model_dump_json(indent=1).encode())
    temporary.rename(target)
    _sync_folder(target.parent)


def _read_manifest(path: Path) -> CheckpointManifest:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise OperatorFault(f"{path}: {path.stat().st_size} bytes is no manifest")
        values = json.loads(path.read_bytes())
        if isinstance(values, dict) and values.get("format") != FORMAT:  # before its keys, which a new format may add
            raise OperatorFault(f"{path}: format {values.get('format')}, this version reads {FORMAT}")
        return CheckpointManifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise OperatorFault(f"{path} is no checkpoint manifest: {place}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OperatorFault(
            f"{path} is no checkpoint manifest ({reason}); move {path.parent} away to go on from an older one"
        ) from None


def _rank_file(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def _record(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
