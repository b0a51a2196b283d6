"""Storing targets: a rank's slots to shards, and all ranks' shards to one target set.

Each shard gets a record `.shard-00003-000000.json` once it is whole. A job that was killed resumes after the whole
shards, with any number of ranks; `finish_targets` makes the records one manifest.

Legend: B slots, S tokens of a sequence, K ids of a token.
"""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from megadistill.data.shards.shard_record import record_path, remove_unlisted
from megadistill.data.shards.tar import index_path, index_tar, write_index, write_tar
from megadistill.data.targets.target_codec import Members, TargetCodec
from megadistill.data.targets.target_manifest import (
    SlotMap,
    TargetKey,
    TargetManifest,
    TargetShard,
    key_differences,
    split_into_ranges,
)
from megadistill.errors import UserError
from megadistill.io import read_file, write_file
from megadistill.types import SparseTargets

SHARD_BYTES: Final = 256 << 20
"""Bytes of targets in a shard; a rank holds as many in memory until it writes them."""
SHARDS: Final = "shard-?????-??????"
"""Names of target shards, by rank and number; a token shard, `shard-00000`, does not match."""


def refuse_other_content(folder: Path) -> None:
    """Raises UserError where `folder` holds something other than targets."""
    if not folder.exists() or (folder.is_dir() and (not any(folder.iterdir()) or any(folder.glob(f"*{SHARDS}*")))):
        return
    raise UserError(f"{folder} exists, and holds something other than targets: give another folder")


class TargetWriter:
    """Writer of one rank's targets. One writer a rank at a time."""

    def __init__(self, folder: Path, key: TargetKey, *, rank: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
        """`shard_bytes` of targets make a shard.

        Raises:
            UserError: the folder holds a finished target set, a part of another one, or something else.
        """
        assert key.teacher is not None, "stored targets need a teacher in their key"
        TargetManifest.refuse_finished(folder)
        refuse_other_content(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._key, self._rank, self._shard_bytes = folder, key, rank, shard_bytes
        whole = _whole_shards(folder, key)
        self._stored = SlotMap(whole)
        own = [shard.file.name for shard in whole if shard.file.name.startswith(_prefix(rank))]
        self._number = 1 + max((int(Path(name).stem.removeprefix(_prefix(rank))) for name in own), default=-1)
        self._codec = TargetCodec(key)
        self._waiting: dict[int, tuple[int, Members]] = {}
        self._waiting_bytes = 0

    def first_missing(self, start: int, stop: int) -> int:
        """The first slot of [start, stop) that was not stored when this writer was made; `stop` where none is missing.

        The same on every rank, if all writers are made before any of them stores: where to resume.
        """
        return self._stored.first_missing(start, stop)

    def add(self, slots: Tensor, digests: Tensor, targets: SparseTargets) -> None:
        """Takes whole slots, in any order; those that were stored before are ignored.

        Args:
            slots, digests: [B] int64, of a `TokenBatch`.
            targets: of their B·S tokens, in float32.

        Raises:
            ValueError: they are not targets of the key.
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
            members = self._codec.encode(ids_BSK[row], probs_BSK[row], log_tail_BS[row])
            self._waiting[int(slots[row])] = int(digests[row]), members
            self._waiting_bytes += sum(member.nbytes for member in members.values())
            if self._waiting_bytes >= self._shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Writes the waiting slots as a shard, even a small one: before a checkpoint that counts them as done."""
        if not self._waiting:
            return
        path = self._folder / f"{_prefix(self._rank)}{self._number:06d}.tar"
        slots = sorted(self._waiting)
        write_tar(path, ({"__key__": f"{slot:016d}", **self._waiting[slot][1]} for slot in slots))
        own_columns = np.array([(slot, self._waiting[slot][0]) for slot in slots], dtype=np.int64)
        index = np.hstack([own_columns, index_tar(path, self._codec.members)])
        shard = TargetShard(write_index(path, index), split_into_ranges(slots))
        write_file(record_path(path), _Record(key=self._key, shard=shard).model_dump_json())
        self._number += 1
        self._waiting, self._waiting_bytes = {}, 0


def finish_targets(folder: Path, key: TargetKey) -> TargetManifest:
    """Makes the whole shards of all ranks one target set, which is immutable from now on. One process, at the end.

    Raises:
        UserError: there are none, they are of another key, or the set is finished.
    """
    TargetManifest.refuse_finished(folder)
    shards = _whole_shards(folder, key)
    if not shards:
        raise UserError(f"{folder} holds no stored targets: store some first")
    TargetManifest(version=2, key=key, shards=tuple(shards)).write(folder)
    remove_unlisted(folder, SHARDS, (shard.file for shard in shards))
    return TargetManifest.load(folder)


class _Record(BaseModel):
    """The record of a whole shard, and its target set's key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    key: TargetKey
    shard: TargetShard


def _whole_shards(folder: Path, key: TargetKey) -> list[TargetShard]:
    """The whole shards, in the order of their names. Raises UserError: one has another key."""
    shards = []
    for path in sorted(folder.glob(f".{SHARDS}.json")):
        try:
            record = _Record.model_validate_json(read_file(path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}): delete it; its shard is written again"
            ) from None
        differing = key_differences(record.key, key, stop=record.shard.stop)
        if differing:
            raise UserError(
                f"{folder} holds a part of another target set: {'; '.join(differing)}: "
                "undo the change, give another folder, or delete it"
            )
        tar = folder / record.shard.file.name
        if tar.is_file() and tar.stat().st_size == record.shard.file.bytes and index_path(tar).is_file():
            shards.append(record.shard)
    return shards


def _prefix(rank: int) -> str:
    return f"shard-{rank:05d}-"
