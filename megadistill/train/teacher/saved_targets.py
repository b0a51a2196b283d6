"""Targets that a live teacher makes, saved for later runs (`teacher.save_targets`)."""

from dataclasses import replace
from pathlib import Path

import torch

from megadistill.data.targets.target_manifest import TargetKey
from megadistill.data.targets.target_writer import TargetWriter, finish_targets
from megadistill.distributed.collectives import barrier
from megadistill.distributed.topology import Topology
from megadistill.types import SparseTargets, TokenBatch


class SavedTargets:
    """Writes this rank's share of a target set."""

    def __init__(self, folder: Path, key: TargetKey, topology: Topology) -> None:
        self._folder, self._key, self._topology = folder, key, topology
        self._writer: TargetWriter | None = None
        self._last_slots = torch.empty(0, dtype=torch.int64)

    def open(self) -> None:
        """Begins to write, after what all ranks have stored so far. Collective.

        Raises:
            UserError: the folder holds other targets, or a finished set.
        """
        self.flush()
        self._writer = TargetWriter(self._folder, self._key, rank=self._topology.rank)
        self._last_slots = self._last_slots[:0]
        barrier(self._topology.world_group)  # no rank writes before all have seen what is stored

    def first_missing(self, start: int, stop: int) -> int:
        """See `TargetWriter.first_missing`."""
        assert self._writer is not None, "call open first"
        return self._writer.first_missing(start, stop)

    def add(self, batch: TokenBatch, targets: SparseTargets) -> None:
        """The targets of a micro-batch's rows, without surplus ones, whose slot is another row's: `TargetWriter.add`.

        A micro-batch that is computed twice in a row is stored once.
        """
        assert self._writer is not None, "call open first"
        if not torch.equal(batch.slots, self._last_slots):
            proper = int((~batch.surplus).sum())  # surplus rows are the last ones
            self._writer.add(batch.slots[:proper], batch.digests[:proper], _first_rows(targets, proper, len(batch)))
            self._last_slots = batch.slots

    def flush(self) -> None:
        """Writes what is in memory, as a shard."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self) -> str | None:
        """Makes the shards of all ranks one target set; a log line on rank 0. Collective."""
        if self._writer is None:
            return None
        self.flush()
        barrier(self._topology.world_group)
        if not self._topology.is_first:
            return None
        manifest = finish_targets(self._folder, self._key)
        return f"{self._folder}: targets of {manifest.slots:,} sequences, {manifest.bytes_per_token:.1f} bytes a token"


def _first_rows(targets: SparseTargets, count: int, rows: int) -> SparseTargets:
    """The targets of the first `count` of `rows` rows, which have equally many tokens."""
    if count == rows:
        return targets
    tokens = len(targets) // rows * count
    return replace(targets, ids=targets.ids[:tokens], probs=targets.probs[:tokens], log_tail=targets.log_tail[:tokens])
