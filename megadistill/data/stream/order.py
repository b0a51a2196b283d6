"""The order of a mixture: slot to (source, shard, sequence), through a curriculum of weights; a pure function.

A curriculum entry assigns its slots to sources by integer quotas: of each period of P slots a source gets q. Its k-th
sequence falls into the slots [floor((k-1)·P/q), ceil(k·P/q)), which earliest deadline first always meets (Baruah,
Cohen, Plaxton and Varvel, 1996, "Proportionate progress"), so that no prefix strays from its share by a whole sequence.
In a later entry a source continues where it stopped in the earlier one, epochs included.

Legend: N slots to locate, P slots of a period, K sources.
"""

import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadistill.data.stream.shuffle import ORDER_VERSION, Positions, SourceOrder
from megadistill.errors import UserError

MAX_PERIOD = 1 << 16
"""Weights whose exact period is longer are rounded to this many parts."""


@dataclass(frozen=True)
class CurriculumEntry:
    """`slots` sequences, shared by `weights` (source name -> share, of any sum); None: without an end."""

    slots: int | None
    weights: Mapping[str, float]
    batch: int | None = None
    """Sequences of a step; None: those of the run. No part of the order."""
    begins_segment: bool = False
    """Whether its steps have another shape than those of the entry before."""


@dataclass(frozen=True)
class Source:
    """A split as the order sees it: its manifest's fingerprint, and the number of sequences of each shard."""

    fingerprint: str
    counts: Positions | Sequence[int]


class Order:
    """The place of each slot's sequence. The sources are numbered in the order of their names."""

    def __init__(self, sources: Mapping[str, Source], curriculum: Sequence[CurriculumEntry], *, seed: int) -> None:
        """The last entry of `curriculum` has no end, and every other one has.

        Raises:
            UserError: a weight is too small for its period.
        """
        assert curriculum[-1].slots is None
        assert all(entry.slots for entry in curriculum[:-1])
        self.names = tuple(sorted(sources))
        self._orders = [SourceOrder(sources[name].counts, seed=seed, name=name) for name in self.names]
        self._schedules: list[_Schedule] = []
        start, taken_K = 0, np.zeros(len(self.names), dtype=np.int64)
        shares = [quotas(entry.weights, entry=number) for number, entry in enumerate(curriculum, 1)]
        for entry, share in zip(curriculum, shares, strict=True):
            schedule = _Schedule(start, [share.get(name, 0) for name in self.names], taken_K)
            self._schedules.append(schedule)
            if entry.slots is not None:
                start, taken_K = start + entry.slots, taken_K + schedule.count(entry.slots)
        self.description: dict[str, Any] = {
            "version": ORDER_VERSION,
            "seed": seed,
            "sources": {name: sources[name].fingerprint for name in self.names},
            "stages": [
                {"slots": entry.slots, "quotas": share} for entry, share in zip(curriculum, shares, strict=True)
            ],
        }
        """All that decides the order, as JSON values; its keys are part of every fingerprint."""
        self.fingerprint = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def locate(self, slots_N: Positions) -> Positions:
        """[N, 3] int64: source, shard, and sequence in the shard, of each slot [N] int64."""
        slots_N = np.asarray(slots_N, dtype=np.int64)
        places_N3 = np.empty((len(slots_N), 3), dtype=np.int64)
        for in_entry, sources_n, positions_n in self._assigned(slots_N):
            for source in np.unique(sources_n).tolist():
                here = sources_n == source
                places_N3[in_entry[here], 0] = source
                places_N3[in_entry[here], 1:] = self._orders[source].locate(positions_n[here])
        return places_N3

    def sources(self, slots_N: Positions) -> Positions:
        """[N] int64: the source of each slot [N], which costs less than `locate`."""
        slots_N = np.asarray(slots_N, dtype=np.int64)
        sources_N = np.empty_like(slots_N)
        for in_entry, sources_n, _ in self._assigned(slots_N):
            sources_N[in_entry] = sources_n
        return sources_N

    def _assigned(self, slots_N: Positions) -> Iterator[tuple[Positions, Positions, Positions]]:
        """For each curriculum entry: places of its slots in `slots_N`, their sources, their positions in these."""
        starts = np.array([schedule.start for schedule in self._schedules])
        entries_N = np.searchsorted(starts, slots_N, side="right") - 1
        for entry in np.unique(entries_N).tolist():
            in_entry = np.flatnonzero(entries_N == entry)
            yield in_entry, *self._schedules[entry].assign(slots_N[in_entry])

    def sequences_read(self, slots: int) -> dict[str, int]:
        """Source -> its sequences in the first `slots` slots."""
        schedule = next(each for each in reversed(self._schedules) if each.start <= slots)
        read_K = schedule.taken_K + schedule.count(slots - schedule.start)
        return dict(zip(self.names, read_K.tolist(), strict=True))


class _Schedule:
    """A curriculum entry from slot `start` on, before which its sources have given `taken_K` sequences."""

    def __init__(self, start: int, quotas_K: Sequence[int], taken_K: Positions) -> None:
        self.start = start
        self._quotas_K = np.asarray(quotas_K, dtype=np.int64)
        self.taken_K = taken_K
        self._period_P = interleave(quotas_K)
        self._earlier_P = np.empty(len(self._period_P), dtype=np.int64)  # of the same source, in this period
        for source in range(len(quotas_K)):
            here = self._period_P == source
            self._earlier_P[here] = np.arange(here.sum())

    def assign(self, slots_N: Positions) -> tuple[NDArray[np.int64], Positions]:
        """The source [N] of each slot [N] of this entry, and the position [N] in that source's stream."""
        rounds_N, places_N = np.divmod(slots_N - self.start, len(self._period_P))
        sources_N = self._period_P[places_N]
        taken_N = self.taken_K[sources_N] + self._quotas_K[sources_N] * rounds_N + self._earlier_P[places_N]
        return sources_N, taken_N.astype(np.int64, copy=False)

    def count(self, slots: int) -> Positions:
        """[K]: sequences of each source in the first `slots` slots of this entry."""
        rounds, places = divmod(slots, len(self._period_P))
        partial_K = np.bincount(self._period_P[:places], minlength=len(self._quotas_K)).astype(np.int64)
        return rounds * self._quotas_K + partial_K


def quotas(weights: Mapping[str, float], *, entry: int) -> dict[str, int]:
    """Whole numbers in the ratio of `weights`, as small as they can be; their sum is the period.

    Weights are taken as the decimals that they are written as. Where the exact period would be longer than MAX_PERIOD,
    the parts of MAX_PERIOD are given out by the largest remainder.

    Raises:
        UserError: a source would get no part at all.
    """
    exact = {name: Fraction(repr(weights[name])) for name in sorted(weights)}
    total = sum(exact.values())
    denominator = math.lcm(*((share / total).denominator for share in exact.values()))
    if denominator <= MAX_PERIOD:
        return {name: int(share / total * denominator) for name, share in exact.items()}
    shares = {name: share / total * MAX_PERIOD for name, share in exact.items()}
    parts = {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(parts, key=lambda name: (parts[name] - shares[name], name))
    for name in by_remainder[: MAX_PERIOD - sum(parts.values())]:
        parts[name] += 1
    for name, part in parts.items():
        if part == 0:
            raise UserError(
                f"data.curriculum: in entry {entry} the weight of {name} is {weights[name]} of {float(total)}, less "
                f"than one sequence in {MAX_PERIOD}: leave the source out, or raise its weight"
            )
    return parts


def interleave(quotas_K: Sequence[int]) -> NDArray[np.int64]:
    """[P]: the source of each slot of a period, source k `quotas_K[k]` times, evenly spread."""
    period = sum(quotas_K)
    pattern_P = np.empty(period, dtype=np.int64)
    waiting = [(0, source, 1) for source, quota in enumerate(quotas_K) if quota]  # by the slot of their release
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # by deadline
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-number * period // quotas_K[source]), source, number))
        _, source, number = heapq.heappop(ready)
        pattern_P[slot] = source
        if number < quotas_K[source]:
            heapq.heappush(waiting, (number * period // quotas_K[source], source, number + 1))
    return pattern_P


def order_differences(before: Mapping[str, Any], now: Mapping[str, Any], *, next_slot: int) -> list[str]:
    """Differences of two descriptions in the part that decided the slots below `next_slot`; a line each."""
    old, new = _consumed(before, next_slot), _consumed(now, next_slot)
    lines = [
        f"the {what} was {old[key]}, is {new[key]}"
        for key, what in (("version", "version of the order"), ("seed", "seed"))
        if old[key] != new[key]
    ]
    for name in sorted(old["sources"].keys() | new["sources"].keys()):
        if name in old["sources"] and name in new["sources"] and old["sources"][name] != new["sources"][name]:
            lines.append(
                f"source {name} was the manifest {old['sources'][name][:12]}…, is {new['sources'][name][:12]}…"
            )
    for number in range(1, max(len(old["stages"]), len(new["stages"])) + 1):
        was, is_ = (one["stages"][number - 1] if number <= len(one["stages"]) else None for one in (old, new))
        if was != is_:
            lines.append(f"curriculum entry {number} was {_described(was)}, is {_described(is_)}")
    return lines


def _consumed(description: Mapping[str, Any], next_slot: int) -> dict[str, Any]:
    """The description without what slots below `next_slot` did not need: later entries, their sources, the end of the
    entry that is under way."""
    entries: list[dict[str, Any]] = []
    start = 0
    for entry in description["stages"]:
        if start >= next_slot:
            break
        slots = entry["slots"]
        ended = slots is not None and start + slots < next_slot  # one that ends exactly here may still be prolonged
        entries.append({"slots": slots if ended else None, "quotas": entry["quotas"]})
        start += slots or next_slot
    used = {name for entry in entries for name in entry["quotas"]}
    sources = {name: fingerprint for name, fingerprint in description["sources"].items() if name in used}
    return {**description, "sources": sources, "stages": entries}


def _described(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "absent"
    shares = ", ".join(f"{name} {quota}" for name, quota in entry["quotas"].items())
    return f"{shares} parts" + (f" for {entry['slots']:,} sequences" if entry["slots"] is not None else "")
