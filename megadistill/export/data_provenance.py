"""The data that a run has trained on until a checkpoint, by source, from the cursor alone. No shard is opened.

Legend: P slots of a stage's period, K sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadistill.config.recipe import Recipe
from megadistill.data import Manifest
from megadistill.data.stream.order import interleave
from megadistill.errors import UserError
from megadistill.train.checkpoint.format import CheckpointManifest
from megadistill.types import Cursor


@dataclass(frozen=True)
class SourceRead:
    """The part of one source."""

    name: str
    fingerprint: str
    """The sha256 of its manifest."""
    sequences: int
    manifest: Manifest | None
    """None where it is not at hand, or has changed since."""

    def tokens(self, sequence_length: int) -> int:
        """Tokens that were read of it; `sequence_length`: where its manifest is not at hand."""
        return self.sequences * (sequence_length if self.manifest is None else self.manifest.sequence_length)


@dataclass(frozen=True)
class DataProvenance:
    """The data that the student was trained on."""

    cursor: Cursor
    order: Mapping[str, Any]
    """Sources, stages and seed; see `data.mixture.Order`."""
    tokens: int
    sequence_length: int
    """Tokens of a sequence; the mean, where curriculum entries differ in it."""
    sources: tuple[SourceRead, ...]

    @classmethod
    def of(cls, manifest: CheckpointManifest, recipe: Recipe) -> "DataProvenance":
        cursor = Cursor.from_state(manifest.cursor)
        order = manifest.cursor["order"]
        sequences = sequences_of(order, cursor)
        named = {"data": recipe.data.manifest} if recipe.data.manifest is not None else recipe.data.sources
        return cls(
            cursor=cursor,
            order=order,
            tokens=manifest.tokens,
            sequence_length=_length(manifest, recipe, sum(sequences.values())),
            sources=tuple(
                SourceRead(name, fingerprint, sequences[name], _manifest(named.get(name), fingerprint))
                for name, fingerprint in sorted(order["sources"].items())
            ),
        )


def _length(manifest: CheckpointManifest, recipe: Recipe, sequences: int) -> int:
    if len(manifest.cursor["order"]["stages"]) == 1:
        own = recipe.data.curriculum[0].global_batch if recipe.data.curriculum else None
        return manifest.tokens // (manifest.step * (own or recipe.train.global_batch))
    return manifest.tokens // max(1, sequences)


def sequences_of(order: Mapping[str, Any], cursor: Cursor) -> dict[str, int]:
    """Source -> sequences trained on in the slots below the cursor, without those that were masked or skipped.

    `order`: the order's description in the cursor.
    """
    names = sorted(order["sources"])
    end = cursor.next_slot
    trained_K = _counts(order["stages"], names, end)
    for start, stop in [*cursor.skips, *((slot, slot + 1) for slot in cursor.masked_slots)]:
        trained_K -= _counts(order["stages"], names, min(stop, end)) - _counts(order["stages"], names, min(start, end))
    return dict(zip(names, trained_K.tolist(), strict=True))


def _counts(stages: Sequence[Mapping[str, Any]], names: Sequence[str], stop: int) -> NDArray[np.int64]:
    """[K] number of the slots below `stop` of each source."""
    counts_K = np.zeros(len(names), dtype=np.int64)
    for stage in stages:
        slots = stop if stage["slots"] is None else min(stop, stage["slots"])
        quotas_K = [stage["quotas"].get(name, 0) for name in names]
        rounds, places = divmod(slots, sum(quotas_K))
        partial_K = np.bincount(interleave(quotas_K)[:places], minlength=len(names))
        counts_K += rounds * np.asarray(quotas_K, dtype=np.int64) + partial_K
        stop -= slots
    return counts_K


def _manifest(location: str | None, fingerprint: str) -> Manifest | None:
    """A source's manifest, if it is on this machine: no URL is read, as a card is written without a network."""
    if location is None or "://" in location:
        return None
    try:
        manifest = Manifest.load(location)
    except UserError:
        return None
    return manifest if manifest.fingerprint == fingerprint else None
