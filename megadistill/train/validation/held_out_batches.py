"""The micro-batches of a validation on this rank: the same rows of each split for every number of ranks.

Legend: B sequences of a micro-batch, S tokens of a sequence, n rows that are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadistill.data.shards.shard_cache import ShardCache
from megadistill.distributed.topology import Topology
from megadistill.heldout.splits import Split, own_batches
from megadistill.types import IGNORED_LABEL, TokenBatch

NO_SOURCE = -1
"""The source of rows that are of none of the training data's."""


@dataclass(frozen=True)
class HeldOutBatch:
    """A micro-batch of one split."""

    batch: TokenBatch
    """[B, S], as all micro-batches of the run: rows beyond the split's have no labels."""
    split: int
    """Number of the split."""


class HeldOutBatches:
    """Iterable over this rank's micro-batches, as many on every rank. Iterate it once for each validation.

    All ranks read one split at a time, so that the micro-batches of a round of the teacher's have one shape. A rank has
    a consecutive share of a split's micro-batches; where they do not divide, some ranks get one without labels. A
    damaged sequence has no labels either.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        topology: Topology,
        *,
        rows: Sequence[int],
        document_mask: bool,
        sources: Sequence[str] = (),
    ) -> None:
        """
        Args:
            rows: B of each split.
            sources: names of the training data's sources, by number. A split with the name of one has its teachers.
            document_mask: whether the run's micro-batches are read document by document (`data.document_mask`). Those
                of a split of which an evaluation reads each sequence as one document have one document then.
        """
        self.splits, self._rows = tuple(splits), tuple(rows)
        self._document_mask, self._part = document_mask, topology.sequence_part
        self._sources = [sources.index(split.name) if split.name in sources else NO_SOURCE for split in self.splits]
        self._group_size = topology.group_size
        self._own: list[list[range]] = []
        self._rounds: list[int] = []
        for split, size in zip(self.splits, self._rows, strict=True):
            own = own_batches([split], size, rank=topology.data_rank, world=topology.data_world)
            self._own.append([slots for _, slots in own])
            self._rounds.append(-(-split.sequences // (size * topology.data_world)))
        cache = ShardCache()
        self._streams = [
            split.stream(document_mask=document_mask, masks_corrupt=True, cache=cache) for split in self.splits
        ]
        self.faults: dict[tuple[int, int], str] = {}
        """(split, slot) -> fault of each damaged sequence that this rank has met."""

    def __len__(self) -> int:
        return sum(self._rounds)

    def __iter__(self) -> Iterator[HeldOutBatch]:
        for split, (own, rounds) in enumerate(zip(self._own, self._rounds, strict=True)):
            for slots in own:
                yield self._read(split, slots, len(slots))
            for _ in range(rounds - len(own)):
                yield self._read(split, range(1), 0)

    def _read(self, split: int, slots: range, labelled: int) -> HeldOutBatch:
        """A micro-batch of the rows `slots`, of which the first `labelled` keep their labels."""
        read = self._streams[split].batch(slots)
        self.faults.update({(split, slot): fault for slot, fault in read.faults})
        places = torch.arange(self._rows[split])
        row_B = torch.where(places < len(read), places, 0)  # tokens that all models know, where no row is left
        labels = read.labels[row_B].masked_fill((places >= labelled).unsqueeze(1), IGNORED_LABEL)
        batch = TokenBatch(
            tokens=read.tokens[row_B],
            labels=labels,
            slots=read.slots[row_B],
            digests=read.digests[row_B],
            starts=read.starts[row_B],
            document_mask=self._document_mask,
            sources=torch.tensor(self._sources[split]),
            peer_sources=torch.full((self._rows[split], self._group_size), self._sources[split]),
        )
        if self._document_mask and not read.document_mask:
            batch = replace(batch, starts=_whole_rows(batch.starts))
        return HeldOutBatch(batch.of_part(self._part), split)


@dataclass(frozen=True)
class Validations:
    """The validations of an attempt: after which of its steps there is one, of which micro-batches."""

    batches: HeldOutBatches
    first_step: int
    """Step after which the attempt begins."""
    at_first: bool
    """Whether there is one before the attempt's first step."""
    every: int
    last: int
    """Last step of the run."""

    def due(self, step: int) -> bool:
        """Whether there is one after `step`."""
        if step == self.first_step:
            return self.at_first
        return step % self.every == 0 or step == self.last


def _whole_rows(starts_BS: Tensor) -> Tensor:
    """[B, S] bool: each row is one document; a damaged one stays without any."""
    whole = torch.zeros_like(starts_BS)
    whole[:, 0] = starts_BS.any(dim=1)
    return whole
