"""Reading stored targets: slots to `SparseTargets`, each slot checked before anybody sees it. It knows no models.

An index is [U, 5 + 2·members] int64: slot, digest of the slot's tokens, where the sample begins in the tar, its length
and its crc32; then, for each member, its place in the sample and its bytes.

Legend: B slots asked for, S tokens of a sequence, N = B·S, K ids kept of a token, U samples of a shard.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from isal import isal_zlib
from torch import Tensor

from megadistill.data.shards.npy import Misfit, npy_header_of
from megadistill.data.shards.reader import ShardFault
from megadistill.data.shards.tar import MAX_UNIT_BYTES, Index
from megadistill.data.storage.base import Bytes
from megadistill.data.targets.target_codec import Row, RowFormat
from megadistill.data.targets.target_manifest import SlotMap, TargetKey, TargetManifest, TargetShard
from megadistill.types import SparseTargets

OPEN_SHARDS: Final = 64
"""Kept open at a time."""
FIXED_COLUMNS: Final = 5


@dataclass(frozen=True)
class _OpenShard:
    """A shard whose size and index are what the manifest says."""

    path: str
    file: Bytes
    rows: Index


class TargetReader:
    """The targets of a finished set. One thread at a time."""

    def __init__(self, location: Path | str, key: TargetKey) -> None:
        """`location` is the folder, a path or a URL; `key` is what the run needs.

        Raises:
            UserError: there is no finished target set, or it was stored for another run.
        """
        self.manifest = TargetManifest.load(location)
        self.manifest.require_compatible(key)
        self._places = SlotMap(self.manifest.shards)
        self._format = RowFormat(self.manifest.key)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def first_missing(self, start: int, stop: int) -> int:
        """The first slot of [start, stop) that the set does not hold; `stop` where none is missing."""
        return self._places.first_missing(start, stop)

    def read(self, slots: Tensor, digests: Tensor) -> SparseTargets:
        """The targets of `slots` [B], on the CPU; K is the largest number of ids that one of their tokens keeps.

        `digests` [B], of the tokens in those slots: targets of other tokens are refused. A row of zeros, which stands
        for a damaged unit and is learned by nobody, may have any.

        Raises:
            ShardFault: a slot is missing or damaged, or its targets are those of other tokens.
        """
        places_B2 = self._places.locate(slots.numpy())
        missing = slots.numpy()[places_B2[:, 0] < 0]
        if len(missing):
            raise ShardFault(
                f"{self.manifest.folder.location} holds no targets of slot {missing[0]}: it has {self.manifest.slots} "
                f"slots below {self.manifest.stop}; store the others too, or train fewer tokens"
            )
        found = [(self._shard(number), sample) for number, sample in places_B2.tolist()]
        self.manifest.folder.prefetch((shard.file, *shard.rows[sample, 2:4].tolist()) for shard, sample in found)
        rows = [
            self._row(shard, sample, slot=slot, digest=digest)
            for (shard, sample), slot, digest in zip(found, slots.tolist(), digests.tolist(), strict=True)
        ]
        return self._assembled(rows)

    def _row(self, shard: _OpenShard, sample: int, *, slot: int, digest: int) -> Row:
        written, stored_digest, start, length, crc, *places = shard.rows[sample].tolist()
        where = f"{shard.path} slot {slot} at byte {start}"
        if written != slot:
            raise ShardFault(f"{where}: expected that slot, found slot {written}")
        if digest not in (stored_digest, 0):
            raise ShardFault(f"{where}: expected the targets of the tokens in that slot, found those of others")
        try:
            data = shard.file.read(start, length)
            if isal_zlib.crc32(data) != crc:
                raise Misfit(f"expected crc32 {crc:#010x}, found {isal_zlib.crc32(data):#010x}")
            ats, sizes = places[::2], places[1::2]
            return self._format.decoded(
                {name: data[at : at + size] for name, at, size in zip(self._format.members, ats, sizes, strict=True)}
            )
        except Misfit as misfit:
            raise ShardFault(f"{where}: {misfit}") from None
        except OSError as error:
            raise ShardFault(f"{where}: expected {length} bytes, found: {error.strerror or error}") from None

    def _assembled(self, rows: list[Row]) -> SparseTargets:
        kept_N = np.concatenate([row.kept for row in rows])
        K = int(kept_N.max())
        there_NK = np.arange(K) < kept_N[:, None]
        ids_NK = np.full(there_NK.shape, -1, dtype=np.int64)
        ids_NK[there_NK] = np.concatenate([row.ids for row in rows])
        probs_NK = np.zeros(there_NK.shape, dtype=np.float32)
        probs_NK[there_NK] = np.concatenate([row.probs for row in rows])
        log_tail_N = np.concatenate([row.log_tail for row in rows])
        return SparseTargets(
            ids=torch.from_numpy(ids_NK),
            probs=torch.from_numpy(probs_NK),
            log_tail=torch.from_numpy(log_tail_N),
            tail=self.manifest.key.tail,
            temperature=self.manifest.key.temperature,
        )

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            self._open[number] = self._opened(self.manifest.shards[number])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _opened(self, shard: TargetShard) -> _OpenShard:
        folder, file = self.manifest.folder, shard.file
        path = f"{folder.location}/{file.name}"
        columns = FIXED_COLUMNS + 2 * len(self._format.members)
        header = npy_header_of((file.units, columns), "<i8")
        expected = len(header) + 8 * file.units * columns
        try:
            index, tar = folder.open(file.index), folder.open(file.name)
            if index.size != expected or tar.size != file.bytes:
                raise ShardFault(
                    f"{path}: expected {file.bytes} bytes and an index of {expected}, found {tar.size} and {index.size}"
                )
            data = index.read(0, expected)
        except OSError as error:
            raise ShardFault(f"{path}: expected a shard and its index, found: {error.strerror or error}") from None
        if hashlib.sha256(data).hexdigest() != file.index_sha256 or data[: len(header)] != header:
            raise ShardFault(f"{folder.location}/{file.index}: expected the index of {file.name}, found another file")
        rows = np.frombuffer(data, dtype="<i8", offset=len(header)).reshape(file.units, columns)
        _require_sound(rows, path, file.bytes)
        return _OpenShard(path, tar, rows)


def _require_sound(rows: Index, path: str, size: int) -> None:
    """Raises ShardFault: a range lies outside of its sample, or a sample outside of the `size` bytes of its tar."""
    starts, lengths = rows[:, 2], rows[:, 3]
    ats, sizes = rows[:, FIXED_COLUMNS::2], rows[:, FIXED_COLUMNS + 1 :: 2]
    small = ((rows[:, 2:] >= 0) & (rows[:, 2:] <= max(size, 1 << 32))).all()  # what follows cannot overflow
    inside = small and (starts + lengths <= size).all() and (ats + sizes <= lengths[:, None]).all()
    if not inside or (lengths > MAX_UNIT_BYTES).any():
        raise ShardFault(f"{path}: expected samples inside of {size} bytes, found an index with others")
