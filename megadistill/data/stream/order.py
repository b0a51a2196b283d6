"""The mixture: slot to (source, shard, unit), through stages and weights; a pure function. It knows no files.

A stage deals its slots out to its sources by integer quotas: of each period of P slots a source gets q. Its k-th unit
falls into the slots [floor((k-1)·P/q), ceil(k·P/q)), which earliest deadline first always meets (Baruah, Cohen, Plaxton
and Varvel, 1996, "Proportionate progress"): so no prefix strays from its share by a whole unit. A source goes on in a
later stage where it stopped in the earlier one, epochs included.

Legend: N slots asked for, P slots of a period, K sources.
"""

import hashlib
import heapq
import json
import math
from collections.abc import Mapping, Sequence
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
class Stage:
    """`slots` sequences, dealt out by `weights` (source name -> share, in any unit); None: without an end."""

    slots: int | None
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Source:
    """What the order needs to know of a split: its manifest's fingerprint, and the units of each shard."""

    fingerprint: str
    counts: Sequence[int]


class Order:
    """Where each slot's unit lies. The sources are numbered in the order of their names."""

    def __init__(self, sources: Mapping[str, Source], stages: Sequence[Stage], *, seed: int) -> None:
        """The last stage has no end, and every other one has.

        Raises:
            UserError: a weight that is too small for its period.
        """
        assert stages[-1].slots is None
        assert all(stage.slots for stage in stages[:-1])
        self.names = tuple(sorted(sources))
        self._orders = [SourceOrder(sources[name].counts, seed=seed, name=name) for name in self.names]
        self._dealt: list[_DealtStage] = []
        start, taken_K = 0, np.zeros(len(self.names), dtype=np.int64)
        for number, stage in enumerate(stages, 1):
            shares = quotas(stage.weights, stage=number)
            dealt = _DealtStage(start, [shares.get(name, 0) for name in self.names], taken_K)
            self._dealt.append(dealt)
            if stage.slots is not None:
                start, taken_K = start + stage.slots, taken_K + dealt.count(stage.slots)
        self.description: dict[str, Any] = {
            "version": ORDER_VERSION,
            "seed": seed,
            "sources": {name: sources[name].fingerprint for name in self.names},
            "stages": [
                {"slots": stage.slots, "quotas": quotas(stage.weights, stage=number)}
                for number, stage in enumerate(stages, 1)
            ],
        }
        """What decides every position, as JSON values."""
        self.fingerprint = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def locate(self, slots_N: Positions) -> Positions:
        """[N, 3] int64: source, shard, and unit in the shard, of each slot [N] int64."""
        slots_N = np.asarray(slots_N, dtype=np.int64)
        places_N3 = np.empty((len(slots_N), 3), dtype=np.int64)
        starts = np.array([dealt.start for dealt in self._dealt])
        stages_N = np.searchsorted(starts, slots_N, side="right") - 1
        for stage in np.unique(stages_N).tolist():
            in_stage = np.flatnonzero(stages_N == stage)
            sources_n, positions_n = self._dealt[stage].deal(slots_N[in_stage])
            for source in np.unique(sources_n).tolist():
                here = sources_n == source
                places_N3[in_stage[here], 0] = source
                places_N3[in_stage[here], 1:] = self._orders[source].locate(positions_n[here])
        return places_N3


class _DealtStage:
    """A stage that begins at slot `start`, when its sources have given `taken_K` units before."""

    def __init__(self, start: int, quotas_K: Sequence[int], taken_K: Positions) -> None:
        self.start = start
        self._quotas_K = np.asarray(quotas_K, dtype=np.int64)
        self._taken_K = taken_K
        self._period_P = interleave(quotas_K)
        self._earlier_P = np.empty(len(self._period_P), dtype=np.int64)  # of the same source, in this period
        for source in range(len(quotas_K)):
            here = self._period_P == source
            self._earlier_P[here] = np.arange(here.sum())

    def deal(self, slots_N: Positions) -> tuple[NDArray[np.int64], Positions]:
        """The source [N] of each slot [N] of this stage, and the position [N] in that source's stream."""
        rounds_N, places_N = np.divmod(slots_N - self.start, len(self._period_P))
        sources_N = self._period_P[places_N]
        taken_N = self._taken_K[sources_N] + self._quotas_K[sources_N] * rounds_N + self._earlier_P[places_N]
        return sources_N, taken_N.astype(np.int64, copy=False)

    def count(self, slots: int) -> Positions:
        """[K]: units of each source in the first `slots` slots of this stage."""
        rounds, places = divmod(slots, len(self._period_P))
        begun_K = np.bincount(self._period_P[:places], minlength=len(self._quotas_K)).astype(np.int64)
        return rounds * self._quotas_K + begun_K


def quotas(weights: Mapping[str, float], *, stage: int) -> dict[str, int]:
    """Whole numbers in the ratio of `weights`, as small as they can be; their sum is the period.

    Weights are read as the decimals that they are written as. Where the exact period would be longer than MAX_PERIOD,
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
                f"data.stages: in stage {stage} the weight of {name} is {weights[name]} of {float(total)}, less than "
                f"one sequence in {MAX_PERIOD}: leave the source out, or raise its weight"
            )
    return parts


def interleave(quotas_K: Sequence[int]) -> NDArray[np.int64]:
    """[P]: the source of each slot of a period, each source k as often as `quotas_K[k]` says, evenly spread."""
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


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, next_slot: int) -> list[str]:
    """What differs in the part of two descriptions that slots below `next_slot` were read by; a line each."""
    old, new = _consumed(before, next_slot), _consumed(now, next_slot)
    found = [
        f"the {what} was {old[key]}, is {new[key]}"
        for key, what in (("version", "version of the order"), ("seed", "seed"))
        if old[key] != new[key]
    ]
    for name in sorted(old["sources"].keys() | new["sources"].keys()):
        if name in old["sources"] and name in new["sources"] and old["sources"][name] != new["sources"][name]:
            found.append(
                f"source {name} was the manifest {old['sources'][name][:12]}…, is {new['sources'][name][:12]}…"
            )
    for number in range(1, max(len(old["stages"]), len(new["stages"])) + 1):
        was, is_ = (stages[number - 1] if number <= len(stages) else None for stages in (old["stages"], new["stages"]))
        if was != is_:
            found.append(f"stage {number} was {_in_words(was)}, is {_in_words(is_)}")
    return found


def _consumed(description: Mapping[str, Any], next_slot: int) -> dict[str, Any]:
    """The description without what slots below `next_slot` did not need: later stages, their sources, the end of the
    stage that is under way."""
    stages: list[dict[str, Any]] = []
    start = 0
    for stage in description["stages"]:
        if start >= next_slot:
            break
        slots = stage["slots"]
        ended = slots is not None and start + slots < next_slot  # one that ends exactly here may still be prolonged
        stages.append({"slots": slots if ended else None, "quotas": stage["quotas"]})
        start += slots or next_slot
    used = {name for stage in stages for name in stage["quotas"]}
    sources = {name: fingerprint for name, fingerprint in description["sources"].items() if name in used}
    return {**description, "sources": sources, "stages": stages}


def _in_words(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return "absent"
    shares = ", ".join(f"{name} {quota}" for name, quota in stage["quotas"].items())
    return f"{shares} parts" + (f" for {stage['slots']:,} sequences" if stage["slots"] is not None else "")
