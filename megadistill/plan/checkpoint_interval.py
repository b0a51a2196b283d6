"""The interval between checkpoints that costs least: what saves cost against the steps that faults take again.

Young (1974, doi 10.1145/361147.361115) and Daly (2006, doi 10.1016/j.future.2004.11.016) for faults at random times, at
a constant rate. Their cost of a checkpoint is the time that training waits for it; an asynchronous save is written
while training continues, so a fault also loses the steps since the save that was not yet whole. Faults that a run with
replicas survives have a cost of their own (`plan.replica_deaths`).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from megadistill.plan.estimate import Estimate
from megadistill.plan.replica_deaths import NO_DEATHS, Deaths, count_deaths
from megadistill.plan.restart import LOCAL_STORAGE, restart_parts, storage_rate

LLAMA3_SECONDS_BETWEEN_FAULTS, LLAMA3_GPUS = 54 * 86_400 / 419, 16_384
"""Llama 3 405B (arXiv:2407.21783, table 5): 419 unexpected interruptions in 54 days on 16,384 H100."""

HOST_COPY = 10e9
"""Bytes a second of the copy of a rank's state to its host, which training waits for. Assumed: PCIe 4 halved."""
SAVE_SECONDS = 0.1
"""Time (s) of a save's collectives and checks beside its bytes: the largest of 32 ranks on two cores."""
LEAST_SECONDS = 60.0
"""Shortest interval (s) of the advice: each save makes and removes a file a rank, which shared storage has to bear."""

WORTHWHILE = 0.01
"""Gain of goodput from which another interval is advised with a warning."""


@dataclass(frozen=True)
class SaveCosts:
    """Times (s) that decide how often to save."""

    stall: float
    """Time that training waits for a save."""
    write: float
    """Time from then until the save is whole."""
    restart: float
    """Time from a fault to the first step after it."""
    between_faults: float
    """Mean time between two faults of the run."""
    deaths: Deaths = NO_DEATHS
    """Those of the faults that end one replica of the student alone."""

    @property
    def between_restarts(self) -> float:
        """Mean time between two faults that end the run; infinite where there are none."""
        share = 1.0 - self.deaths.share
        return self.between_faults / share if share > 0 else math.inf

    def goodput(self, interval: float) -> float:
        """Useful step time over wall time, for `interval` seconds of steps between saves.

        Daly's complete model, equation 20, with the time to write added to that of a restart, for the faults that end
        the run; times what the others leave (`Deaths.goodput`).
        """
        return self._of_restarts(interval) * self.deaths.goodput(self.between_faults)

    def _of_restarts(self, interval: float) -> float:
        mean = self.between_restarts
        if math.isinf(mean):
            return interval / (interval + self.stall)
        exponent = (interval + self.stall) / mean
        if exponent + (self.restart + self.write) / mean > 500:
            return 0.0
        return interval / mean / math.exp((self.restart + self.write) / mean) / math.expm1(exponent)

    @property
    def best(self) -> float:
        """Daly's interval of best goodput, equation 37: Young's, sqrt(2 · stall · mean), with its next terms.

        At least the time of a save, since one is under way at a time, and `LEAST_SECONDS`.
        """
        stall, mean = self.stall, self.between_restarts
        interval = mean
        if stall < 2 * mean:
            half = stall / (2 * mean)
            interval = math.sqrt(2 * stall * mean) * (1 + math.sqrt(half) / 3 + half / 9) - stall
        return max(interval, stall + self.write, LEAST_SECONDS)


@dataclass(frozen=True)
class CheckpointAdvice:
    """How often a run should save."""

    costs: SaveCosts
    restart_parts: dict[str, float]
    """Parts (s) of the restart."""
    step: float
    """Time (s) of an optimizer step."""
    key: str
    """The recipe's key of the saves that a restart after a fault reads."""
    own: int
    """Its steps in the recipe."""
    run_steps: int

    @property
    def without_survival(self) -> "CheckpointAdvice":
        """The same run where each fault is a restart."""
        return replace(self, costs=replace(self.costs, deaths=NO_DEATHS))

    @cached_property
    def every(self) -> int:
        """The advised steps between saves: a round number."""
        steps = self.costs.best / self.step
        return self.run_steps if steps >= self.run_steps else min(self.run_steps, round_steps(steps))

    def goodput(self, steps: int) -> float:
        return self.costs.goodput(min(steps, self.run_steps) * self.step)

    @property
    def gain(self) -> float:
        """Goodput of the advice over that of the recipe, as a difference."""
        return self.goodput(self.every) - self.goodput(self.own)

    @property
    def warning(self) -> str | None:
        """A line where the recipe's own interval is far off."""
        if self.gain < WORTHWHILE:
            return None
        why = "steps taken again after faults" if self.own > self.every else "waiting for saves"
        return f"{self.key}={self.own} loses {self.gain:.1%} of the time by {why}: {self.every} is better"


def round_steps(steps: float) -> int:
    """The nearest of 1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, ... by its ratio."""
    scale = 10 ** max(0, math.floor(math.log10(max(steps, 1.0))))
    rounds = [int(part * scale) for part in (1, 2, 2.5, 5, 10) if scale > 1 or part != 2.5]
    return min(rounds, key=lambda each: abs(math.log(each / max(steps, 1.0))))


def fault_seconds(gpus: int) -> float:
    """Mean time (s) between faults of a run on `gpus`, at the rate of Llama 3's."""
    return LLAMA3_SECONDS_BETWEEN_FAULTS * LLAMA3_GPUS / gpus


def advise(estimate: Estimate, *, between_faults: float | None = None) -> CheckpointAdvice:
    """The advice for a layout. `between_faults`: mean time (s) between faults; None: by `fault_seconds`."""
    run = estimate.sharding
    local, size = run.recipe.checkpoint.local, estimate.requirements.checkpoint_bytes
    write = size / storage_rate(run.shard, run.ranks_per_node)  # by the ranks of one replica
    if local is not None:  # a save of its own, and the copy of a neighbour
        write = 2 * run.replicas * size / (estimate.cluster.nodes * LOCAL_STORAGE)
    stall = SAVE_SECONDS + size / run.shard / HOST_COPY
    if not run.recipe.checkpoint.asynchronous:
        stall, write = stall + write, 0.0
    parts = restart_parts(estimate)
    costs = SaveCosts(
        stall,
        write,
        sum(parts.values()),
        between_faults or fault_seconds(estimate.cluster.ranks),
        count_deaths(estimate, parts),
    )
    return CheckpointAdvice(
        costs=costs,
        restart_parts=parts,
        step=estimate.times.step,
        key="train.checkpoint_every" if local is None else "checkpoint.local.every",
        own=run.recipe.train.checkpoint_every if local is None else local.every,
        run_steps=run.steps,
    )
