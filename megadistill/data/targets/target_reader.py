"""Reading stored targets: slots to `SparseTargets`, each slot checked.

The index of a shard (see `shards.opening`) has two columns of its own: slot, and digest of the slot's tokens.

Legend: B slots to read, S tokens of a sequence, N = B·S, K ids of a token.
"""

from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from megadistill.data.shards.npy import MemberError
from megadistill.data.shards.opening import OPEN_SHARDS, OpenShard, ShardFault, open_indexed_tar
from megadistill.data.targets.target_codec import TargetCodec, TargetRow
from megadistill.data.targets.target_manifest import SlotMap, TargetKey, TargetManifest
from megadistill.types import SparseTargets

OWN_COLUMNS: Final = 2


class TargetReader:
    """The targets of a finished set. One thread at a time."""

    def __init__(self, location: Path | str, key: TargetKey) -> None:
        """`location` is the folder, a path or a URL; `key` is that of the run.

        Raises:
            UserError: there is no finished target set, or it was stored for another run.
        """
        self.manifest = TargetManifest.load(location)
        self.manifest.require_compatible(key)
        self._places = SlotMap(self.manifest.shards)
        self._codec = TargetCodec(self.manifest.key)
        shards, opened_from = self.manifest.shards, self.manifest.folder
        members = dict.fromkeys(self._codec.members, True)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(
            lambda number: open_indexed_tar(opened_from, shards[number].file, members, own_columns=OWN_COLUMNS)
        )

    def first_missing(self, start: int, stop: int) -> int:
        """The first slot of [start, stop) that the set does not hold; `stop` where none is missing."""
        return self._places.first_missing(start, stop)

    def read(self, slots: Tensor, digests: Tensor) -> SparseTargets:
        """The targets of `slots` [B], on the CPU; K is the largest number of ids of one of their tokens.

        `digests` [B] of the tokens in those slots: targets of other tokens are refused. A masked row, of zeros, may
        have any.

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
        places = [(self._open(number), sample) for number, sample in places_B2.tolist()]
        self.manifest.folder.prefetch((shard.file, *shard.index[sample, 2:4].tolist()) for shard, sample in places)
        rows = [
            self._row(shard, sample, slot=slot, digest=digest)
            for (shard, sample), slot, digest in zip(places, slots.tolist(), digests.tolist(), strict=True)
        ]
        return self._assembled(rows) if rows else self._nothing()

    def _row(self, shard: OpenShard, sample: int, *, slot: int, digest: int) -> TargetRow:
        written, stored_digest, start, length, crc, *places = shard.index[sample].tolist()
        where = f"{shard.path} slot {slot} at byte {start}"
        if written != slot:
            raise ShardFault(f"{where}: expected that slot, found slot {written}")
        if digest not in (stored_digest, 0):
            raise ShardFault(f"{where}: expected the targets of the tokens in that slot, found those of others")
        try:
            data = shard.sample(start, length, crc)
            members = zip(self._codec.members, places[::2], places[1::2], strict=True)
            return self._codec.decode({name: data[at : at + size] for name, at, size in members})
        except MemberError as error:
            raise ShardFault(f"{where}: {error}") from None

    def _nothing(self) -> SparseTargets:
        """The targets of no rows: of a micro-batch whose rows all have other teachers."""
        none_01 = torch.zeros(0, 1)
        tail, temperature = self.manifest.key.tail, self.manifest.key.temperature
        return SparseTargets(none_01.long(), none_01, torch.zeros(0), tail, temperature)

    def _assembled(self, rows: list[TargetRow]) -> SparseTargets:
        num_ids_N = np.concatenate([row.num_ids for row in rows])
        K = int(num_ids_N.max())
        valid_NK = np.arange(K) < num_ids_N[:, None]
        ids_NK = np.full(valid_NK.shape, -1, dtype=np.int64)
        ids_NK[valid_NK] = np.concatenate([row.ids for row in rows])
        probs_NK = np.zeros(valid_NK.shape, dtype=np.float32)
        probs_NK[valid_NK] = np.concatenate([row.probs for row in rows])
        log_tail_N = np.concatenate([row.log_tail for row in rows])
        return SparseTargets(
            ids=torch.from_numpy(ids_NK),
            probs=torch.from_numpy(probs_NK),
            log_tail=torch.from_numpy(log_tail_N),
            tail=self.manifest.key.tail,
            temperature=self.manifest.key.temperature,
        )
