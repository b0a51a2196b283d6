"""Room `export`: what a run has read until a checkpoint, source by source, from the cursor alone. It opens no shard.

Legend: P slots of a stage's period, K sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadistill.config import Recipe
from megadistill.data import Manifest
from megadistill.data.stream.order import interleave
from megadistill.errors import UserError
from megadistill.train.checkpoint.format import CheckpointManifest
from megadistill.types import Cursor


@dataclass(frozen=True)
class SourceRead:
    """What was read of one source."""

    name: str
    fingerprint: str
    """sha256 of its manifest."""
    sequences: int
    manifest: Manifest | None
    """None where it is not at hand, or is not the one that was read."""


@dataclass(frozen=True)
class Reading:
    """What the student was trained on."""

    cursor: Cursor
    order: Mapping[str, Any]
    """Sources, stages and seed; see `data.mixture.Order`."""
    tokens: int
    sequence_length: int
    sources: tuple[SourceRead, ...]

    @classmethod
    def of(cls, manifest: CheckpointManifest, recipe: Recipe) -> "Reading":
        cursor = Cursor.from_state(manifest.cursor)
        order = manifest.cursor["order"]
        read = sequences_of(order, cursor)
        named = {"data": recipe.data.manifest} if recipe.data.manifest is not None else recipe.data.sources
        return cls(
            cursor=cursor,
            order=order,
            tokens=manifest.tokens,
            sequence_length=manifest.tokens // (manifest.step * recipe.train.global_batch),
            sources=tuple(
                SourceRead(name, fingerprint, read[name], _manifest(named.get(name), fingerprint))
                for name, fingerprint in sorted(order["sources"].items())
            ),
        )


def sequences_of(order: Mapping[str, Any], cursor: Cursor) -> dict[str, int]:
    """Source -> sequences that were learned from, in the slots below the cursor: without those that were masked or skipped.

    `order` is the description that a cursor carries.
    """
    names = sorted(order["sources"])
    end = cursor.next_slot
    read_K = _dealt(order["stages"], names, end)
    for start, stop in [*cursor.skips, *((slot, slot + 1) for slot in cursor.masked_slots)]:
        read_K -= _dealt(order["stages"], names, min(stop, end)) - _dealt(order["stages"], names, min(start, end))
    return dict(zip(names, read_K.tolist(), strict=True))


def _dealt(stages: Sequence[Mapping[str, Any]], names: Sequence[str], stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[K]: how many of the slots below `stop` each source has."""
    dealt_K = np.zeros(len(names), dtype=np.int64)
    for stage in stages:
        slots = stop if stage["slots"] is None else min(stop, stage["slots"])
        quotas_K = [stage["quotas"].get(name, 0) for name in names]
        rounds, places = divmod(slots, sum(quotas_K))
        begun_K = np.bincount(interleave(quotas_K)[:places], minlength=len(names))
        dealt_K += rounds * np.asarray(quotas_K, dtype=np.int64) + begun_K
        stop -= slots
    return dealt_K


def _manifest(location: str | None, fingerprint: str) -> Manifest | None:
    """That of a source, where it lies on this machine; a URL is not asked: a card may be written without a network."""
    if location is None or "://" in location:
        return None
    try:
        manifest = Manifest.load(location)
    except UserError:
        return None
    return manifest if manifest.fingerprint == fingerprint else None
