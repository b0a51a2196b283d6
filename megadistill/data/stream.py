"""The stream: batches by slot number, the same for every world size. It knows ranks as two numbers, no groups.

A position in the data is one integer, the global slot. A batch of G slots is cut into one contiguous run of rows a
rank, so that the ranks' rows in rank order are the global batch, whatever their number.

Legend: B rows of this rank, S tokens of a sequence.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megadistill.data.order import ORDER_VERSION, Order
from megadistill.data.shards import Manifest, ShardFault, ShardReader, Unit
from megadistill.errors import UserError
from megadistill.records import Cursor, TokenBatch, token_digest

OPEN_SHARDS = 64
"""Shards kept mapped at a time; a map costs address space and its index, 24 bytes a unit."""


def shift(units: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Units [..., S + 1] to tokens [..., S] and the labels [..., S] that follow them. The one place that says so."""
    return units[..., :-1], units[..., 1:]


class TokenStream:
    """Iterates `(batch, cursor)` for ever: this rank's rows of the next global batch, and the position after it.

    Nothing is lost or repeated when a stream is started from a cursor, in a world of any size.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        batch_slots: int,
        rank: int,
        world_size: int,
        start: Cursor | None = None,
    ) -> None:
        """`batch_slots` sequences are a global batch, over all `world_size` ranks; `start` is where to go on.

        Raises:
            UserError: `batch_slots` does not divide by `world_size`, or `start` belongs to another order.
        """
        assert 0 <= rank < world_size, f"rank {rank} of a world of {world_size}"
        if batch_slots < 1 or batch_slots % world_size:
            below, above = batch_slots // world_size * world_size, (batch_slots // world_size + 1) * world_size
            fits = f"{below} or {above}" if below > 0 else f"{above}"
            raise UserError(
                f"a global batch of {batch_slots} sequences does not divide over {world_size} ranks: "
                f"the nearest that do are {fits}"
            )
        self.fingerprint = _fingerprint(manifest, seed)
        """Names the order: manifest, seed, version of the arithmetic. Not the batch size, which a run may change."""
        self.start = start or Cursor(self.fingerprint, 0)
        if self.start.fingerprint != self.fingerprint:
            raise UserError(
                f"the position to resume from belongs to another order of the data: fingerprint "
                f"{self.start.fingerprint[:12]}…, but {manifest.folder} with seed {seed} is {self.fingerprint[:12]}…: "
                "resume with the manifest and the data seed of that run, or start a new run"
            )
        if self.start.next_slot < 0:
            raise UserError(f"the position to resume from is slot {self.start.next_slot}: slots count from 0")
        self._manifest = manifest
        self._order = Order([shard.units for shard in manifest.shards], seed)
        self._reader = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: ShardReader(manifest, shard))
        self._batch_slots = batch_slots
        self._rows = batch_slots // world_size
        self._first_row = rank * self._rows

    def __iter__(self) -> Iterator[tuple[TokenBatch, Cursor]]:
        next_slot = self.start.next_slot
        while True:
            first = next_slot + self._first_row
            next_slot += self._batch_slots
            yield self.batch(range(first, first + self._rows)), Cursor(self.fingerprint, next_slot)

    def batch(self, slots: range) -> TokenBatch:
        """The rows of `slots`, on the host. range(0, manifest.units) visits every unit of the split once.

        Raises:
            ShardFault: a shard does not hold what the manifest says.
        """
        slots_B = np.arange(slots.start, slots.stop, slots.step, dtype=np.int64)
        rows_BU = np.empty((len(slots_B), self._manifest.sequence_length + 1), dtype=np.int64)
        places = self._order.locate(slots_B).tolist()
        for row, (slot, (shard, unit)) in enumerate(zip(slots, places, strict=True)):
            rows_BU[row] = self._unit(slot, shard, unit)
        tokens_BS, labels_BS = (torch.from_numpy(np.ascontiguousarray(part)) for part in shift(rows_BU))
        return TokenBatch(
            tokens=tokens_BS, labels=labels_BS, slots=torch.from_numpy(slots_B), digests=token_digest(tokens_BS)
        )

    def _unit(self, slot: int, shard: int, unit: int) -> Unit:
        try:
            return self._reader(shard).unit(unit)
        except ShardFault as fault:
            raise ShardFault(f"slot {slot}, shard {shard}: {fault}") from None


def _fingerprint(manifest: Manifest, seed: int) -> str:
    return hashlib.sha256(json.dumps([manifest.fingerprint, seed, ORDER_VERSION]).encode()).hexdigest()
