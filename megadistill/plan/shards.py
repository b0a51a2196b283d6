"""The choice of `distributed.shard`: ranks over which ZeRO-3 shards a copy of the student.

Fewer ranks hold more of the student each, have shorter rings, and make more replicas, so a death costs less; but the
all-reduce of the gradients has more bytes a rank, 4 · parameters / shard. It is waited for: with the number of ranks
that is chosen here it takes less than 1 % of a step, so to overlap it with the last backward pass, in buckets, would
gain nothing that shows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megadistill.config.load import validate_recipe
from megadistill.errors import UserError
from megadistill.plan.checkpoint_interval import CheckpointAdvice, advise
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import Cluster, divisors, place
from megadistill.plan.plan_input import PlanInput
from megadistill.plan.throughput import MfuAssumption

TIGHT = 0.1
"""Fraction of free memory below which a fit is called tight, as an allocator never uses all of its memory."""
EQUAL = 0.002
"""Relative difference of throughputs that no estimate tells apart."""
MOST_ALL_REDUCE = 0.01
"""Fraction of a step up to which the all-reduce of the gradients does not matter."""
LARGEST_SHARD = 512
"""Most ranks of a candidate, but for all of the student's."""


@dataclass(frozen=True, eq=False)
class ShardCandidate:
    """A layout with one number of ranks to a replica."""

    estimate: Estimate
    advice: CheckpointAdvice
    """Saves and faults, where the run goes on without a replica that dies."""

    @cached_property
    def goodput(self) -> float:
        """Useful step time over wall time, at the advised interval between saves."""
        return self.advice.goodput(self.advice.every)

    @cached_property
    def goodput_with_restarts(self) -> float:
        """Goodput where each fault is a restart."""
        advice = self.advice.without_survival
        return advice.goodput(advice.every)

    @property
    def useful_tokens_per_second(self) -> float:
        return self.estimate.tokens_per_second * self.goodput

    @property
    def all_reduce(self) -> float:
        """Seconds of a step in which the gradients of the replicas are added up, without the call's latency."""
        return self.estimate.times.across * self.estimate.times.micro_steps

    @property
    def is_comfortable(self) -> bool:
        return self.estimate.margin >= TIGHT * self.estimate.cluster.accelerator.memory_bytes


def shard_candidates(
    main: Estimate, inputs: PlanInput, mfu: MfuAssumption, *, between_faults: float | None = None
) -> tuple[ShardCandidate, ...]:
    """The layout with other numbers of ranks to a replica, its own among them; fewest ranks first.

    Empty where the student is within a node: its ranks then share one copy. `between_faults`: see `advise`.
    """
    run, cluster = main.sharding, main.cluster
    if run.ranks <= cluster.gpus_per_node:
        return ()
    estimates = [main]
    for shard in _shards(main):
        if shard == run.shard:
            continue
        try:
            estimates.append(_with_shard(main, shard, inputs, cluster, mfu))
        except UserError:  # such as a larger hpZ group, or states on the host
            continue
    ordered = sorted(estimates, key=lambda each: each.sharding.shard)
    return tuple(ShardCandidate(each, advise(each, between_faults=between_faults)) for each in ordered)


def best_shard(candidates: tuple[ShardCandidate, ...]) -> ShardCandidate | None:
    """The candidate with the fewest ranks among those that train as good as most tokens a second; None where none fits.

    Memory comes first: only those count that leave a tenth of it, or where there are none, those that fit; then the
    step with its latency, and goodput. An all-reduce that shows counts against a candidate at any pace of a teacher.
    """
    fitting = [each for each in candidates if each.estimate.fits]
    fitting = [each for each in fitting if each.is_comfortable] or fitting
    if not fitting:
        return None
    most = max(each.useful_tokens_per_second for each in fitting)
    equal = [each for each in fitting if each.useful_tokens_per_second >= (1 - EQUAL) * most]
    short = [each for each in equal if each.all_reduce <= MOST_ALL_REDUCE * each.estimate.times.step] or equal
    return min(short, key=lambda each: each.estimate.sharding.shard)


def _shards(main: Estimate) -> Iterator[int]:
    """Ranks of a replica that are whole nodes and vocab groups, each at least twice the last."""
    run = main.sharding
    unit = math.lcm(run.group_size * run.sequence_ranks, main.cluster.gpus_per_node)
    last = 0
    for shard in divisors(run.ranks):
        if shard % unit == 0 and 2 * last <= shard <= LARGEST_SHARD and shard < run.ranks:
            last = shard
            yield shard
    yield run.ranks


def _with_shard(main: Estimate, shard: int, inputs: PlanInput, cluster: Cluster, mfu: MfuAssumption) -> Estimate:
    run = main.sharding
    values = run.recipe.snapshot()
    values["distributed"]["shard"] = shard if shard < run.ranks else None
    recipe = validate_recipe(values, source=f"distributed.shard={shard}")
    return estimate(place(recipe, replace(inputs, recipe=recipe), cluster), cluster, mfu)
