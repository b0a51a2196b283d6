"""The token stream: batches by slot, the same for every world size.

A position in the data is one integer, the global slot. A global batch of G slots is cut into one contiguous range of
rows a rank, so that the ranks' rows in rank order are the global batch, whatever their number. Where G does not divide,
every rank has equally many rows all the same: those past the G-th are surplus, the last slot once more without labels.

Legend: G slots of a global batch, B rows of this rank, S tokens of a sequence.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadistill.data.shards.insert_bos import insert_bos
from megadistill.data.shards.labels import document_starts, mask_labels, predicted, shift
from megadistill.data.shards.manifest import Manifest
from megadistill.data.shards.opening import ShardFault
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.shards.shard_cache import ShardCache
from megadistill.data.stream.mixture import Mixture
from megadistill.data.stream.order import order_differences
from megadistill.data.stream.segments import Skips
from megadistill.data.stream.shuffle import Positions
from megadistill.errors import UserError
from megadistill.types import IGNORED_LABEL, Cursor, TokenBatch, token_digest, use_device

OnCorruptSample = Literal["fail", "mask"]

Booleans = npt.NDArray[np.bool_]

LOOKAHEAD_ROWS = 4096
"""Rows located at a time: the arithmetic costs as much for one row as for some hundred."""


class TokenStream:
    """Endless iterator of `(batch, cursor)`: this rank's rows of the next global batch, and the position after it.

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
        on_corrupt_sample: OnCorruptSample = "fail",
        max_masked_per_million: int = 100,
        skips: Skips = (),
        prefetch: int = 0,
        pinned_for: torch.device | None = None,
        peers: range | None = None,
        cache: ShardCache | None = None,
        rows: Callable[[int], int] | None = None,
    ) -> None:
        """`batch_slots` sequences are a global batch, over all `world_size` ranks, in segments without a batch of their
        own; `start` is where to resume.

        `document_mask`: documents are read by themselves, and no label lies in another document. `on_corrupt_sample`:
        "fail" raises at a damaged sequence, "mask" makes it a masked sample in its slot, up to `max_masked_per_million`
        in any million slots. `skips`: ranges [start, stop) of slots to leave out. `prefetch`: batches that a thread
        reads ahead; 0 reads on demand. `pinned_for`: an accelerator for which what the iterator delivers is in pinned
        memory, pinned where it is read. `peers`: the ranks whose rows' sources every batch has, as
        `TokenBatch.peer_sources`: they follow from the slots alone; None: this rank. `cache`: what several
        streams of one thread keep open together. `rows`: slot -> rows of each rank in the batches of its segment, G /
        `world_size` at least; None: no more than needed.

        Raises:
            UserError: `start` belongs to another order (a line names what differs in what was read), or `skips` reach
                into what was read.
        """
        assert 0 <= rank < world_size, f"rank {rank} of a world of {world_size}"
        self._mixture = data if isinstance(data, Mixture) else Mixture.of(data)
        assert batch_slots >= 1, f"a global batch of {batch_slots} sequences"
        self._order = self._mixture.order(seed)
        self.fingerprint = self._order.fingerprint
        """sha256 of what decides the order: manifests, curriculum, seed, version of the arithmetic; no batch size."""
        self.start = self._checked(start) if start else Cursor(self.fingerprint, 0)
        self._skips = _merged(skips, self.start)
        self.start = replace(
            self.start,
            fingerprint=self.fingerprint,
            order=json.dumps(self._order.description, sort_keys=True),
            skips=_before(self._skips, self.start.next_slot),
        )
        self._document_mask = document_mask
        self._bos = self._mixture.bos if self._mixture.insert_bos else None
        self._on_fault = on_corrupt_sample
        self._max_masked = max_masked_per_million
        self._masked_slots = set(self.start.masked_slots)
        self._masked_lock = threading.Lock()  # the prefetch thread and the training loop both add slots
        cache = cache or ShardCache()
        self._readers = [self._reader(name, cache) for name in self._order.names]
        self._batch_slots = batch_slots
        self._rank, self._world_size = rank, world_size
        self._peers, self._rows = peers, rows
        self._prefetch, self._pinned_for = prefetch, pinned_for

    def __iter__(self) -> Iterator[tuple[TokenBatch, Cursor]]:
        return _prefetched(self._batches(), self._prefetch, self._pinned_for) if self._prefetch else self._batches()

    def batch(self, slots: range) -> TokenBatch:
        """The rows of `slots`, on the host, skipped ones too. range(0, sequences) visits each one of a split once.

        The slots have sequences of one length.

        Raises:
            ShardFault: a shard does not hold what the manifest says, and `on_corrupt_sample` is "fail"; or too many
                do not.
        """
        slots_B = np.arange(slots.start, slots.stop, slots.step, dtype=np.int64)
        return self._read(slots_B, self._order.locate(slots_B))

    @property
    def next_start(self) -> int:
        """The slot in whose segment the next batch lies: that of `start`, or where too little of it is left the first
        of the next one."""
        slot = self.start.next_slot
        while True:
            segment = self._mixture.segment_at(slot)
            end = int(self._unskipped(slot, np.array([(segment.batch or self._batch_slots) - 1]))[0]) + 1
            if segment.stop is None or end <= segment.stop:
                return slot
            slot = segment.stop

    @property
    def skips(self) -> Skips:
        """Ranges of slots to leave out: those given, and those of `start`."""
        return self._skips

    def with_masked(self, cursor: Cursor, slots: Iterable[int]) -> Cursor:
        """`cursor` with the slots that other ranks masked, which stay masked from now on.

        Raises:
            ShardFault: there are more than `max_masked_per_million` in a million slots.
        """
        self._add_masked(slots)
        return self._cursor(cursor.next_slot)

    def _add_masked(self, slots: Iterable[int]) -> None:
        with self._masked_lock:
            self._masked_slots.update(slots)
            masked = sorted(self._masked_slots)
        for first, last in zip(masked, masked[self._max_masked :], strict=False):
            if last - first < 1_000_000:
                raise ShardFault(
                    f"slots {first} to {last} have more than data.max_masked_per_million {self._max_masked} damaged "
                    "sequences: `megadistill shards verify` lists them; restore the shards, or raise the bound"
                )

    def _checked(self, start: Cursor) -> Cursor:
        if start.next_slot < 0:
            raise UserError(f"the position to resume from is slot {start.next_slot}: slots count from 0")
        if start.fingerprint != self.fingerprint:
            before = json.loads(start.order)
            known = {"version", "seed", "sources", "stages"} <= before.keys()
            now, next_slot = self._order.description, start.next_slot
            differing = order_differences(before, now, next_slot=next_slot) if known else ["its order is not recorded"]
            if differing:
                raise UserError(
                    f"the position to resume from, slot {next_slot}, belongs to another order of the data: "
                    f"{'; '.join(differing)}: undo the change (curriculum entries not yet reached may be edited), "
                    "or start a new run"
                )
        return start

    def _reader(self, name: str, cache: ShardCache) -> SequenceReader:
        manifest = self._mixture.sources[name]
        if self._document_mask and not manifest.sample_format.has_documents:
            raise UserError(
                f"data.document_mask: the shards of {manifest.folder.location} do not record where documents begin: "
                "set it to false, or tokenize the text with this package"
            )
        return SequenceReader(manifest, cache)

    def _batches(self) -> Iterator[tuple[TokenBatch, Cursor]]:
        """Each batch is the next G slots of a segment that are not skipped; see `data.stream.segments`."""
        next_slot = self.next_start
        while True:
            segment = self._mixture.segment_at(next_slot)
            batch_slots = segment.batch or self._batch_slots
            needed = -(-batch_slots // self._world_size)
            rows = needed if self._rows is None else self._rows(next_slot)
            assert rows >= needed, f"{self._world_size} ranks of {rows} rows for {batch_slots} sequences"
            rows_R = np.arange(self._rank * rows, (self._rank + 1) * rows, dtype=np.int64)
            steps = np.arange(max(1, LOOKAHEAD_ROWS // rows), dtype=np.int64)[:, None] * batch_slots
            ends = self._unskipped(next_slot, steps[:, 0] + batch_slots - 1) + 1
            if segment.stop is not None:
                ends = ends[ends <= segment.stop]
                if not len(ends):
                    next_slot = segment.stop
                    continue
            slots_BR = self._unskipped(next_slot, steps[: len(ends)] + np.minimum(rows_R, batch_slots - 1))
            places_BR3 = self._order.locate(slots_BR.reshape(-1)).reshape(*slots_BR.shape, 3)
            begins = [next_slot, *ends.tolist()]
            for slots_R, places_R3, begin, next_slot in zip(slots_BR, places_BR3, begins, begins[1:], strict=False):
                batch = self._read(slots_R, places_R3, surplus_B=rows_R >= batch_slots)
                if self._peers is not None:
                    sources = self._peer_sources(begin, self._peers, rows, batch_slots=batch_slots)
                    batch = replace(batch, peer_sources=sources)
                yield batch if self._pinned_for is None else batch.pinned(), self._cursor(next_slot)

    def _peer_sources(self, next_slot: int, peers: range, rows: int, *, batch_slots: int) -> Tensor:
        """[rows, g]: the sources of the peers' rows of the batch of `batch_slots` that begins at `next_slot`."""
        offsets = np.arange(peers.start * rows, peers.stop * rows, dtype=np.int64)
        sources = self._order.sources(self._unskipped(next_slot, np.minimum(offsets, batch_slots - 1)))
        return torch.from_numpy(sources.reshape(len(peers), rows).T.copy())

    def _cursor(self, next_slot: int) -> Cursor:
        with self._masked_lock:
            masked = tuple(sorted(slot for slot in self._masked_slots if slot < next_slot))
        return replace(self.start, next_slot=next_slot, masked_slots=masked, skips=_before(self._skips, next_slot))

    def _unskipped(self, next_slot: int, offsets: Positions) -> Positions:
        """The slots at `offsets` from `next_slot` on, counting only those that are not skipped."""
        slots = next_slot + offsets
        for start, stop in self._skips:
            if stop > next_slot:
                start = max(start, next_slot)
                slots = np.where(slots >= start, slots + (stop - start), slots)
        return slots

    def _read(self, slots_B: Positions, places_B3: Positions, surplus_B: Booleans | None = None) -> TokenBatch:
        rows = len(slots_B)
        surplus_B = np.zeros(rows, dtype=np.bool_) if surplus_B is None else surplus_B
        length = self._mixture.segment_at(int(slots_B[0]) if rows else 0).sequence_length
        # torch's allocator keeps memory that numpy's would give back and fault in again for each batch.
        tokens, labels = (torch.empty(rows, length, dtype=torch.int64) for _ in range(2))
        starts = torch.empty(rows, length, dtype=torch.bool)
        tokens_BS, labels_BS, starts_BS = tokens.numpy(), labels.numpy(), starts.numpy()
        with self._masked_lock:
            masked_B = np.isin(slots_B, list(self._masked_slots))
        faults: dict[int, str] = {}
        for source, reader in enumerate(self._readers):
            here = np.flatnonzero((places_B3[:, 0] == source) & ~masked_B)
            if not len(here):
                continue
            sequences = reader.read(places_B3[here, 1:])
            whole: slice | Positions = slice(None) if len(here) == rows else here
            manifest = self._mixture.sources[self._order.names[source]]
            packer = manifest.packer
            predicted_elsewhere_B = None
            if self._bos is not None:
                sequences, predicted_elsewhere_B = insert_bos(sequences, self._bos, packer)
            tokens_BS[whole], labels_BS[whole] = shift(sequences.tokens)
            starts_BS[whole] = document_starts(sequences.bounds, sequence_length=length)
            if not manifest.predicts_every_label or self._document_mask:
                across = packer.across_documents and not self._document_mask
                predicted_BS = predicted(sequences.bounds, sequence_length=length, across_documents=across)
                labels_BS[whole] = mask_labels(labels_BS[whole], predicted_BS)
            if predicted_elsewhere_B is not None:
                labels_BS[here[predicted_elsewhere_B], -1] = IGNORED_LABEL
            for row, fault in sequences.faults.items():
                slot, shard = int(slots_B[here[row]]), int(places_B3[here[row], 1])
                where = f"source {self._order.names[source]}, " if len(self._readers) > 1 else ""
                faults[int(here[row])] = f"slot {slot}, {where}shard {shard}: {fault}"
        if faults and self._on_fault == "fail":
            raise ShardFault(faults[min(faults)])
        for row in (*np.flatnonzero(masked_B).tolist(), *faults):
            tokens_BS[row], labels_BS[row], starts_BS[row] = 0, IGNORED_LABEL, False
        labels_BS[surplus_B] = IGNORED_LABEL
        # The rank with a surplus row's slot proper reports what is wrong with it.
        proper = [(row, message) for row, message in sorted(faults.items()) if not surplus_B[row]]
        slot_faults = tuple((int(slots_B[row]), message) for row, message in proper)
        if slot_faults:
            self._add_masked(slot for slot, _ in slot_faults)
        return TokenBatch(
            tokens=tokens,
            labels=labels,
            slots=torch.from_numpy(slots_B.copy()),
            digests=token_digest(tokens),
            starts=starts,
            document_mask=self._document_mask,
            faults=slot_faults,
            sources=torch.from_numpy(places_B3[:, 0].copy()),
            surplus=torch.from_numpy(surplus_B.copy()),
        )


def _merged(skips: Skips, start: Cursor) -> tuple[tuple[int, int], ...]:
    """The given ranges and those of the cursor, in order, without overlaps.

    Raises:
        UserError: a range is empty, or reaches into slots that were delivered.
    """
    for first, stop in skips:
        if not 0 <= first < stop:
            raise UserError(f"data.skip: [{first}, {stop}] is not a range of slots: give [first, one past the last]")
        left_out = any(begin <= first and stop <= end for begin, end in start.skips)
        if first < start.next_slot and not left_out:
            raise UserError(
                f"data.skip: [{first}, {stop}] begins before slot {start.next_slot}, where the run resumes: it was "
                "already read; resume from an earlier checkpoint, or skip later slots"
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


def _prefetched(
    batches: Iterator[tuple[TokenBatch, Cursor]], depth: int, device: torch.device | None
) -> Iterator[tuple[TokenBatch, Cursor]]:
    """The same, read by a thread up to `depth` batches ahead; what it raises is raised in its place."""
    pool = ThreadPoolExecutor(1, "token-stream", initializer=use_device, initargs=(device,))
    try:
        pending = deque(pool.submit(next, batches) for _ in range(depth))
        while True:
            item = pending.popleft().result()
            pending.append(pool.submit(next, batches))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
