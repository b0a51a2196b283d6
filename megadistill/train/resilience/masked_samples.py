"""Corrupt samples that are masked (`data.on_corrupt_sample: mask`): every rank learns those of all ranks."""

import logging

import torch

from megadistill.data import TokenStream
from megadistill.distributed.collectives import all_gather_rows
from megadistill.distributed.topology import Topology
from megadistill.events import EventLog
from megadistill.types import Cursor, TokenBatch

logger = logging.getLogger(__name__)


def masked_cursor(
    batch: TokenBatch, cursor: Cursor, stream: TokenStream, topology: Topology, events: EventLog, *, step: int
) -> Cursor:
    """The cursor behind the batch, with the samples in it that any rank masked; they are recorded. Collective."""
    slots = gather_masked_slots(batch, topology)
    if slots:
        events.write("samples_masked", step=step, slots=slots)
    return stream.with_masked(cursor, slots)


def gather_masked_slots(batch: TokenBatch, topology: Topology) -> list[int]:
    """The slots of the global batch that any rank masked; each rank logs its own. Collective."""
    for _, message in batch.faults:
        logger.warning("%s: masked", message)
    own = torch.full((len(batch),), -1, dtype=torch.int64)
    slots = [slot for slot, _ in batch.faults]
    own[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
    gathered = all_gather_rows(own.to(topology.device), topology.world_group)
    return [slot for slot in gathered.tolist() if slot >= 0]
