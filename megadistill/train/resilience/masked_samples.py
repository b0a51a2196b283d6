"""Corrupt samples that are masked (`data.on_corrupt_sample: mask`): every rank learns those of all ranks.

A flag on the step's reduction says whether there is one: almost every step is spared an all-gather over the world.
"""

import logging
from collections.abc import Mapping

import torch

from megadistill.data import TokenStream
from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.topology import Topology
from megadistill.events import EventLog
from megadistill.types import Cursor, TokenBatch

logger = logging.getLogger(__name__)

MASKED = "masked_samples"
"""Flag of the step's reduction: a rank's masked samples of the batch."""


def masked_flag(batch: TokenBatch) -> dict[str, float]:
    """This rank's flag."""
    return {MASKED: float(len(batch.faults))}


def masked_cursor(
    batch: TokenBatch,
    cursor: Cursor,
    stream: TokenStream,
    topology: Topology,
    events: EventLog,
    *,
    step: int,
    reduced: Mapping[str, float],
) -> Cursor:
    """The cursor behind the batch, with the samples in it that any rank masked; they are recorded.

    `reduced`: the step's flags, summed over ranks. Collective where one has masked a sample.
    """
    slots = gather_masked_slots(batch, topology) if reduced[MASKED] else []
    if slots:
        events.write("samples_masked", step=step, slots=slots)
    return stream.with_masked(cursor, slots)


def gather_masked_slots(batch: TokenBatch, topology: Topology) -> list[int]:
    """The slots of the global batch that any rank masked; each rank logs its own. Collective.

    Ranks that share sequences read the same slots, and each of them may find a damaged one.
    """
    for _, message in batch.faults:
        logger.warning("%s: masked", message)
    own = torch.full((len(batch),), -1, dtype=torch.int64)
    slots = [slot for slot, _ in batch.faults]
    own[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
    gathered = all_gather_rows(own.to(topology.device), topology.world_group)
    return [slot for slot in dict.fromkeys(gathered.tolist()) if slot >= 0]
