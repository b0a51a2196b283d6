"""Storing targets: a rank's slots to shards, and all ranks' shards to one target set. It knows no groups.

Each shard gets a record `.shard-00003-000000.json` once it is whole. What was killed goes on behind the whole shards,
with any number of ranks; `finish_targets` makes the records one manifest.

Legend: B slots, S tokens of a sequence, K ids kept of a token, U samples of a shard.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from webdataset import TarWriter

from megadistill.data.shards.tar import Index, index_path, mapped, member_of, publish, samples
from megadistill.data.targets.target_codec import Members, RowFormat
from megadistill.data.targets.target_manifest import (
    SlotMap,
    TargetKey,
    TargetManifest,
    TargetShard,
    key_differences,
    refuse_finished_targets,
    slot_runs,
)
from megadistill.errors import UserError
from megadistill.io import written_whole
from megadistill.types import SparseTargets

SHARD_BYTES: Final = 256 << 20
"""Of targets; a rank holds as many in memory until it writes them."""
MAX_RECORD_BYTES: Final = 64 << 20
SHARDS: Final = "shard-?????-??????"
"""By rank and number; a token shard, `shard-00000`, is none of them."""


def refuse_foreign(folder: Path) -> None:
    """Raises UserError where `folder` holds something, and no targets."""
    if not folder.exists() or (folder.is_dir() and (not any(folder.iterdir()) or any(folder.glob(f"*{SHARDS}*")))):
        return
    raise UserError(f"{folder} exists, and holds no beginning of targets: give them a folder of their own")


class TargetWriter:
    """Stores what one rank says of its slots. One writer a rank at a time."""

    def __init__(self, folder: Path, key: TargetKey, *, rank: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
        """`shard_bytes`: a shard is written when it has as many.

        Raises:
            UserError: the folder holds a finished target set, the beginning of another one, or something else.
        """
        assert key.teacher is not None, "stored targets are some teacher's"
        refuse_finished_targets(folder)
        refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._key, self._rank, self._shard_bytes = folder, key, rank, shard_bytes
        whole = _whole_shards(folder, key)
        self._stored = SlotMap(whole)
        own = [shard.file.name for shard in whole if shard.file.name.startswith(_prefix(rank))]
        self._number = 1 + max((int(Path(name).stem.removeprefix(_prefix(rank))) for name in own), default=-1)
        self._format = RowFormat(key)
        self._waiting: dict[int, tuple[int, Members]] = {}
        self._waiting_bytes = 0

    def first_missing(self, start: int, stop: int) -> int:
        """The first slot of [start, stop) that no rank had stored when this writer began; `stop` where none is missing.

        The same on every rank that begins before any of them stores: where to go on after a kill.
        """
        return self._stored.first_missing(start, stop)

    def add(self, slots: Tensor, digests: Tensor, targets: SparseTargets) -> None:
        """Takes whole slots, in any order. What was stored before this writer began is left as it is.

        Args:
            slots, digests: [B] int64, of a `TokenBatch`.
            targets: of their B·S tokens, in float32.

        Raises:
            ValueError: they are no targets of the key.
        """
        if (targets.tail, targets.temperature) != (self._key.tail, self._key.temperature):
            raise ValueError(f"targets of {targets.tail} at {targets.temperature} are not those of the key")
        if targets.probs.dtype != torch.float32:
            raise ValueError(f"targets in {targets.probs.dtype}; they are stored as float32, so make them in it")
        shape_BSK = (len(slots), self._key.sequence_length, targets.ids.shape[1])
        ids_BSK = targets.ids.cpu().numpy().reshape(shape_BSK)
        probs_BSK = targets.probs.cpu().numpy().reshape(shape_BSK)
        log_tail_BS = targets.log_tail.cpu().numpy().reshape(shape_BSK[:2])
        missing_B = self._stored.locate(slots.numpy())[:, 0] < 0
        for row in np.flatnonzero(missing_B).tolist():
            if int(slots[row]) in self._waiting:
                continue
            members = self._format.encoded(ids_BSK[row], probs_BSK[row], log_tail_BS[row])
            self._waiting[int(slots[row])] = int(digests[row]), members
            self._waiting_bytes += sum(member.nbytes for member in members.values())
            if self._waiting_bytes >= self._shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Writes what waits as a shard, be it a small one: before a checkpoint that says that these slots are done."""
        if not self._waiting:
            return
        path = self._folder / f"{_prefix(self._rank)}{self._number:06d}.tar"
        slots = sorted(self._waiting)
        with written_whole(path) as file, TarWriter(file, mtime=0) as tar:
            for slot in slots:
                tar.write({"__key__": f"{slot:016d}", **self._waiting[slot][1]})
        named = [(slot, self._waiting[slot][0]) for slot in slots]
        shard = TargetShard(publish(path, _index(path, named, self._format.members)), slot_runs(slots))
        with written_whole(_record_path(path)) as file:
            file.write(_Record(key=self._key, shard=shard).model_dump_json().encode())
        self._number += 1
        self._waiting, self._waiting_bytes = {}, 0


def finish_targets(folder: Path, key: TargetKey) -> TargetManifest:
    """Makes the whole shards of all ranks one target set, which is immutable from now on. One process, at the end.

    Raises:
        UserError: there are none, they are of another key, or the set is finished.
    """
    refuse_finished_targets(folder)
    shards = _whole_shards(folder, key)
    if not shards:
        raise UserError(f"{folder} holds no stored targets: nothing to finish")
    TargetManifest(version=1, key=key, shards=tuple(shards)).write(folder)
    listed = {name for shard in shards for name in (shard.file.name, shard.file.index)}
    for path in [*folder.glob(f"{SHARDS}.tar*"), *folder.glob(f".{SHARDS}*")]:  # the records, and what was broken off
        if path.name not in listed:
            path.unlink()
    return TargetManifest.load(folder)


class _Record(BaseModel):
    """Says that a shard is whole, and what it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    key: TargetKey
    shard: TargetShard


def _whole_shards(folder: Path, key: TargetKey) -> list[TargetShard]:
    """By name. Raises UserError: one is of another key."""
    return [shard for path in sorted(folder.glob(f".{SHARDS}.json")) for shard in _recorded(path, key)]


def _recorded(path: Path, key: TargetKey) -> Iterator[TargetShard]:
    try:
        with open(path, "rb") as file:
            record = _Record.model_validate_json(file.read(MAX_RECORD_BYTES))
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): delete it, and its shard is made again"
        ) from None
    differing = key_differences(record.key, key, stop=record.shard.stop)
    if differing:
        raise UserError(
            f"{path.parent} holds the beginning of other targets: {'; '.join(differing)}: "
            "undo the change, give another folder, or delete it"
        )
    tar = path.parent / record.shard.file.name
    if tar.is_file() and tar.stat().st_size == record.shard.file.bytes and index_path(tar).is_file():
        yield record.shard


def _prefix(rank: int) -> str:
    return f"shard-{rank:05d}-"


def _record_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.json")


def _index(path: Path, named: list[tuple[int, int]], members: tuple[str, ...]) -> Index:
    """[U, 5 + 2·members] int64 of the tar: see `target_reader`. `named` is slot and digest of each sample."""
    file = mapped(path)
    rows = []
    for (slot, digest), sample in zip(named, samples(path), strict=True):
        length = sample.stop - sample.start
        crc = zlib.crc32(file.read(sample.start, length))
        found = [member_of(sample, name, str(path)) for name in members]
        places = [number for member in found for number in (member.at - sample.start, member.bytes)]
        rows.append([slot, digest, sample.start, length, crc, *places])
    return np.array(rows, dtype=np.int64)
