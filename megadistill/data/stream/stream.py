"""The stream: batches by slot number, the same for every world size. It knows ranks as two numbers, no groups.

A position in the data is one integer, the global slot. A batch of G slots is cut into one contiguous run of rows a
rank, so that the ranks' rows in rank order are the global batch, whatever their number.

Legend: B rows of this rank, S tokens of a sequence.
"""

import json
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from megadistill.data.shards.labels import document_starts, labels_of, predicted, shift
from megadistill.data.shards.manifest import Manifest
from megadistill.data.shards.reader import ShardFault, UnitReader
from megadistill.data.stream.mixture import Mixture
from megadistill.data.stream.order import differences
from megadistill.data.stream.shuffle import Positions
from megadistill.errors import UserError
from megadistill.types import IGNORED_LABEL, Cursor, TokenBatch, token_digest

OnFault = Literal["fail", "quarantine"]
Skips = Sequence[tuple[int, int]]

LOOKAHEAD_ROWS = 4096
"""Rows whose places are found at a time: the arithmetic costs as much for one row as for some hundred."""


class TokenStream:
    """Iterates `(batch, cursor)` for ever: this rank's rows of the next global batch, and the position after it.

    Nothing is lost or repeated when a stream is started from a cursor, in a world of any size.
    """

    def __init__(
        self,
        data: Manifest | Mixture,
        *,
        seed: int,
        batch_slots: int,
        rank: int,
        world_size: int,
        start: Cursor | None = None,
        document_mask: bool = False,
        on_fault: OnFault = "fail",
        max_holes_per_million: int = 100,
        skips: Skips = (),
        prefetch: int = 0,
    ) -> None:
        """`batch_slots` sequences are a global batch, over all `world_size` ranks; `start` is where to go on.

        `document_mask`: documents are read by themselves, and no label lies in another document. `on_fault`: what
        becomes of a damaged unit: the end of the run, or a masked row in its slot, up to `max_holes_per_million` of
        them in any million slots. `skips`: ranges [start, stop) of slots to leave out. `prefetch`: batches that a
        thread reads ahead; 0 reads when asked.

        Raises:
            UserError: `batch_slots` does not divide by `world_size`, `start` belongs to another order (a line names
                what differs in what was read), or `skips` reach into what was read.
        """
        assert 0 <= rank < world_size, f"rank {rank} of a world of {world_size}"
        if batch_slots < 1 or batch_slots % world_size:
            below, above = batch_slots // world_size * world_size, (batch_slots // world_size + 1) * world_size
            fits = f"{below} or {above}" if below > 0 else f"{above}"
            raise UserError(
                f"a global batch of {batch_slots} sequences does not divide over {world_size} ranks: "
                f"the nearest that do are {fits}"
            )
        self._mixture = data if isinstance(data, Mixture) else Mixture.of(data)
        self._order = self._mixture.order(seed)
        self.fingerprint = self._order.fingerprint
        """Names the order: manifests, stages, seed, version of the arithmetic. Not the batch size, which may change."""
        self.start = self._checked(start) if start else Cursor(self.fingerprint, 0)
        self._skips = _merged(skips, self.start)
        self.start = replace(
            self.start,
            fingerprint=self.fingerprint,
            order=json.dumps(self._order.description, sort_keys=True),
            skips=_before(self._skips, self.start.next_slot),
        )
        self._document_mask = document_mask
        self._on_fault = on_fault
        self._max_holes = max_holes_per_million
        self._holes = set(self.start.holes)
        self._journal = threading.Lock()  # of the holes: the thread that reads ahead finds them, the run adds others'
        self._readers = [self._reader(name) for name in self._order.names]
        self._batch_slots = batch_slots
        self._rows = batch_slots // world_size
        self._first_row = rank * self._rows
        self._prefetch = prefetch

    def __iter__(self) -> Iterator[tuple[TokenBatch, Cursor]]:
        return _ahead(self._batches(), self._prefetch) if self._prefetch else self._batches()

    def batch(self, slots: range) -> TokenBatch:
        """The rows of `slots`, on the host, skipped ones too. range(0, units) visits every unit of one split once.

        Raises:
            ShardFault: a shard does not hold what the manifest says, and `on_fault` is "fail"; or too many do not.
        """
        slots_B = np.arange(slots.start, slots.stop, slots.step, dtype=np.int64)
        return self._read(slots_B, self._order.locate(slots_B))

    def with_holes(self, cursor: Cursor, slots: Iterable[int]) -> Cursor:
        """`cursor` with the holes that other ranks found, which are journalled from now on.

        Raises:
            ShardFault: there are more than `max_holes_per_million` in a million slots.
        """
        self._add_holes(slots)
        return self._cursor(cursor.next_slot)

    def _add_holes(self, slots: Iterable[int]) -> None:
        with self._journal:
            self._holes.update(slots)
            holes = sorted(self._holes)
        for first, last in zip(holes, holes[self._max_holes :], strict=False):
            if last - first < 1_000_000:
                raise ShardFault(
                    f"slots {first} to {last} have more than data.max_holes_per_million {self._max_holes} damaged "
                    "units: `megadistill shards verify` tells which; mend the shards, or raise the bound"
                )

    def _checked(self, start: Cursor) -> Cursor:
        if start.next_slot < 0:
            raise UserError(f"the position to resume from is slot {start.next_slot}: slots count from 0")
        if start.fingerprint != self.fingerprint:
            before = json.loads(start.order)
            known = {"version", "seed", "sources", "stages"} <= before.keys()
            now, next_slot = self._order.description, start.next_slot
            differing = differences(before, now, next_slot=next_slot) if known else ["it does not say which"]
            if differing:
                raise UserError(
                    f"the position to resume from, slot {next_slot}, belongs to another order of the data: "
                    f"{'; '.join(differing)}: undo the change (stages that lie in the future may be edited), "
                    "or start a new run"
                )
        return start

    def _reader(self, name: str) -> UnitReader:
        manifest = self._mixture.sources[name]
        if self._document_mask and manifest.unit.bounds is None:
            raise UserError(
                f"data.document_mask: the shards of {manifest.folder.location} do not say where documents begin: "
                "set it to false, or tokenize the text with this package"
            )
        return UnitReader(manifest)

    def _batches(self) -> Iterator[tuple[TokenBatch, Cursor]]:
        """Each batch is the next G slots that are not skipped."""
        next_slot = self.start.next_slot
        batches = max(1, LOOKAHEAD_ROWS // self._rows)
        while True:
            steps = np.arange(batches, dtype=np.int64)[:, None] * self._batch_slots
            ends = self._unskipped(next_slot, steps[:, 0] + self._batch_slots - 1) + 1
            slots_BR = self._unskipped(next_slot, steps + np.arange(self._first_row, self._first_row + self._rows))
            places_BR3 = self._order.locate(slots_BR.reshape(-1)).reshape(*slots_BR.shape, 3)
            for slots_R, places_R3, next_slot in zip(slots_BR, places_BR3, ends.tolist(), strict=True):
                batch = self._read(slots_R, places_R3)
                yield batch, self._cursor(next_slot)

    def _cursor(self, next_slot: int) -> Cursor:
        with self._journal:
            holes = tuple(sorted(slot for slot in self._holes if slot < next_slot))
        return replace(self.start, next_slot=next_slot, holes=holes, skips=_before(self._skips, next_slot))

    def _unskipped(self, next_slot: int, offsets: Positions) -> Positions:
        """The slots at `offsets` from `next_slot` on, counting only those that are not skipped."""
        slots = next_slot + offsets
        for start, stop in self._skips:
            if stop > next_slot:
                start = max(start, next_slot)
                slots = np.where(slots >= start, slots + (stop - start), slots)
        return slots

    def _read(self, slots_B: Positions, places_B3: Positions) -> TokenBatch:
        rows, sequence = len(slots_B), self._mixture.sequence_length
        # torch's allocator keeps memory that numpy's would give back and fault in again for each batch.
        tokens, labels = (torch.empty(rows, sequence, dtype=torch.int64) for _ in range(2))
        starts = torch.empty(rows, sequence, dtype=torch.bool)
        tokens_BS, labels_BS, starts_BS = tokens.numpy(), labels.numpy(), starts.numpy()
        with self._journal:
            known = np.isin(slots_B, list(self._holes))
        faults: dict[int, str] = {}
        for source, reader in enumerate(self._readers):
            here = np.flatnonzero((places_B3[:, 0] == source) & ~known)
            units = reader.read(places_B3[here, 1:])
            whole: slice | Positions = slice(None) if len(here) == rows else here
            tokens_BS[whole], labels_BS[whole] = shift(units.tokens)
            starts_BS[whole] = document_starts(units.bounds, sequence_length=sequence)
            packer = self._mixture.sources[self._order.names[source]].packer.name
            if packer != "chunk" or self._document_mask:  # whose units are full, and learned across documents
                across = packer != "bestfit" and not self._document_mask
                learned = predicted(units.bounds, sequence_length=sequence, across_documents=across)
                labels_BS[whole] = labels_of(labels_BS[whole], learned)
            for row, fault in units.faults.items():
                slot, shard = int(slots_B[here[row]]), int(places_B3[here[row], 1])
                where = f"source {self._order.names[source]}, " if len(self._readers) > 1 else ""
                faults[int(here[row])] = f"slot {slot}, {where}shard {shard}: {fault}"
        if faults and self._on_fault == "fail":
            raise ShardFault(faults[min(faults)])
        for row in (*np.flatnonzero(known).tolist(), *faults):
            tokens_BS[row], labels_BS[row], starts_BS[row] = 0, IGNORED_LABEL, False
        found = tuple((int(slots_B[row]), message) for row, message in sorted(faults.items()))
        if found:
            self._add_holes(slot for slot, _ in found)
        return TokenBatch(
            tokens=tokens,
            labels=labels,
            slots=torch.from_numpy(slots_B.copy()),
            digests=token_digest(tokens),
            starts=starts,
            document_mask=self._document_mask,
            faults=found,
        )


def _merged(skips: Skips, start: Cursor) -> tuple[tuple[int, int], ...]:
    """The ranges asked for and those of the journal, in order, without overlaps.

    Raises:
        UserError: a range is empty, or reaches into slots that were delivered.
    """
    for first, stop in skips:
        if not 0 <= first < stop:
            raise UserError(f"data.skip: [{first}, {stop}] is no range of slots: give [first, one behind the last]")
        left_out = any(begun <= first and stop <= ended for begun, ended in start.skips)
        if first < start.next_slot and not left_out:
            raise UserError(
                f"data.skip: [{first}, {stop}] begins before slot {start.next_slot}, where the run goes on: it was "
                "read already; resume from an earlier checkpoint, or skip later slots"
            )
    merged: list[tuple[int, int]] = []
    for first, stop in sorted([*start.skips, *((int(first), int(stop)) for first, stop in skips)]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return tuple(merged)


def _before(skips: Skips, next_slot: int) -> tuple[tuple[int, int], ...]:
    return tuple((first, stop) for first, stop in skips if first < next_slot)


@dataclass(frozen=True)
class _Raised:
    error: BaseException


def _ahead(batches: Iterator[tuple[TokenBatch, Cursor]], depth: int) -> Iterator[tuple[TokenBatch, Cursor]]:
    """The same, read by a thread up to `depth` batches ahead; what it raises is raised in its place."""
    waiting: queue.Queue[tuple[TokenBatch, Cursor] | _Raised] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: tuple[TokenBatch, Cursor] | _Raised) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in batches:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as error:  # whatever it is belongs to the reader of the batches
            put(_Raised(error))

    thread = threading.Thread(target=work, name="token-stream", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
