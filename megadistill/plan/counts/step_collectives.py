"""The collectives of an optimizer step on a student's rank: their kind, group and bytes, one entry a call.

It is the one count of them: a plan's latencies are reckoned from it, and `tests/scale/test_collectives.py` compares it,
call by call, with what a rank of a run asks of its process groups. Left out is what does not happen in each step:
saves, diagnostics, `resilience`'s checks, and the first two steps, in which DeepSpeed learns the order of the layers.
Of several replicas it is the count of a first rank, which has the most calls; replicas that are launches of their own
add three small all-reduces within a replica, by which its ranks agree that none of the others is lost.

Legend: as in `plan.counts.sharding`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from megadistill.loss.chunk import SLICE_TERMS
from megadistill.loss.softmax import SLICE_STATS
from megadistill.plan.counts.sharding import FLOAT32, Sharding
from megadistill.plan.counts.traffic import PER_TOKEN_TERMS
from megadistill.plan.counts.zero import GatherCall, gather_calls
from megadistill.types import METRIC_NAMES, PER_TOKEN_NAMES

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, BROADCAST = "all-gather", "reduce-scatter", "all-reduce", "broadcast"
"""Kinds of collectives."""

FLOAT64 = 8
"""Bytes of a float64, and of an int64."""
LOSS_METADATA = 7
"""Numbers of a rank in `loss.inputs.exchange_metadata`."""


class Hidden(Enum):
    """Work that may run at the same time as a collective."""

    FORWARD = "forward"
    """The forward pass."""
    BACKWARD = "backward"
    """The backward pass."""
    NOTHING = "nothing"
    """It is waited for."""


@dataclass(frozen=True)
class Collective:
    """A call of a collective."""

    purpose: str
    kind: str
    """`ALL_GATHER`, `REDUCE_SCATTER`, `ALL_REDUCE` or `BROADCAST`."""
    ranks: int
    nodes: int
    """Nodes that its ranks are on."""
    nbytes: int
    """Bytes of its largest tensor: what a gather receives, what a reduction sends."""
    hidden_behind: Hidden = Hidden.NOTHING
    spans_world: bool = False
    """Whether its ranks are more where the world has more."""


@dataclass(frozen=True)
class StepCollectives:
    """Collectives of an optimizer step of `accumulation` micro-steps."""

    accumulation: int
    first: tuple[Collective, ...]
    """Calls of the first micro-step."""
    later: tuple[Collective, ...]
    """Calls of each further one; none where there is none."""
    once: tuple[Collective, ...]
    """Calls of the step itself."""

    def __iter__(self) -> Iterator[Collective]:
        """All calls of a step."""
        yield from self.first
        for _ in range(self.accumulation - 1):
            yield from self.later
        yield from self.once


def count_collectives(run: Sharding) -> StepCollectives:
    """The collectives of a step on the student's first rank; none of a group of one rank."""
    groups = _Groups(run)
    loss = tuple(call for each in run.each_teacher if each.tokens_with_teacher for call in _loss(each, groups))
    kinds = (True, False) if run.accumulation > 1 else (True,)
    micro_steps = [(*_gathers(run, groups, first=first), *loss, *_reductions(run, groups)) for first in kinds]
    micro_steps += [()] * (2 - len(kinds))
    first, later, once = (
        tuple(each for each in calls if each.ranks > 1) for calls in (*micro_steps, tuple(_once(run, groups)))
    )
    return StepCollectives(run.accumulation, first, later, once)


@dataclass(frozen=True)
class _Groups:
    """Calls over each of a rank's groups."""

    run: Sharding

    def replica(self, purpose: str, kind: str, nbytes: int, hidden_behind: Hidden = Hidden.NOTHING) -> Collective:
        """Over the ranks of a replica of the student, or of its only copy."""
        spans_world = self.run.replicas == 1
        return self._call(purpose, kind, nbytes, hidden_behind, ranks=self.run.shard, stride=1, spans_world=spans_world)

    def across(self, purpose: str, kind: str, nbytes: int) -> Collective:
        """Over the ranks with the same shard, one of each replica."""
        ranks, stride = self.run.replicas, self.run.shard
        return self._call(purpose, kind, nbytes, Hidden.NOTHING, ranks=ranks, stride=stride, spans_world=True)

    def run_wide(self, purpose: str, kind: str, nbytes: int) -> Iterator[Collective]:
        """Over all ranks of the student. Of several replicas the first ranks speak across, and tell the others."""
        yield self.replica(purpose, kind, nbytes)
        if self.run.replicas > 1:
            yield self.across(purpose, kind, nbytes)
            yield self.replica(purpose, BROADCAST, nbytes)

    def copies(self, purpose: str, kind: str, nbytes: int, hidden_behind: Hidden = Hidden.NOTHING) -> Collective:
        """Over the ranks that together hold hpZ's second copy of the weights."""
        return self._call(purpose, kind, nbytes, hidden_behind, ranks=self.run.zero.zero_hpz_partition_size, stride=1)

    def vocab(self, purpose: str, kind: str, nbytes: int) -> Collective:
        return self._call(purpose, kind, nbytes, Hidden.NOTHING, ranks=self.run.group_size, stride=1)

    def slice(self, purpose: str, kind: str, nbytes: int) -> Collective:
        """Over a replica's ranks with the same place in their vocab groups."""
        p, spans_world = self.run.group_size, self.run.replicas == 1
        ranks = self.run.shard // p
        return self._call(purpose, kind, nbytes, Hidden.NOTHING, ranks=ranks, stride=p, spans_world=spans_world)

    def _call(
        self,
        purpose: str,
        kind: str,
        nbytes: int,
        hidden_behind: Hidden,
        *,
        ranks: int,
        stride: int,
        spans_world: bool = False,
    ) -> Collective:
        nodes = -(-ranks // max(1, min(ranks, self.run.ranks_per_node // stride)))
        return Collective(purpose, kind, ranks, nodes, nbytes, hidden_behind, spans_world)


WEIGHTS, COPIES, SCALES = "weights", "weights in the node", "scales of 8-bit weights"
GRADIENTS, HEAD_ROWS, HEAD_GRADIENT = "gradients", "head rows", "gradient of the head"
ACROSS = "gradients across replicas"
SMALL, TOKENS, NUMBERS, NORM = "small parameters", "count of tokens", "numbers of the step", "gradient norm"
LOSS = "loss"
"""Purposes."""

CONTROL = (SMALL, TOKENS, NUMBERS, NORM)
"""Purposes of the calls over a replica, and across replicas, that may be small: all-reduces, whose latency grows with
the logarithm of the nodes, once a step, and where there are replicas a broadcast within each."""

QUANTIZED_GROUP = 2048
"""Most weights that share a scale under qwZ."""


def _gathers(run: Sharding, groups: _Groups, *, first: bool) -> Iterator[Collective]:
    """Gathers of a micro-step; `first`: the first one after an update, when hpZ has no copies of the new weights."""
    if run.shard == 1:
        return
    (_, *others) = run.student.modules
    leaves = ((run.embedding_size,), *(run.gathered_sizes(part) for part in others))
    for number, call in enumerate(gather_calls(leaves, run.zero, prefetch=run.prefetch)):
        # The embedding is looked up at once, so nothing hides its own gather and that of the first layer.
        hidden_behind = Hidden.NOTHING if number < 2 else Hidden.BACKWARD if call.backward else Hidden.FORWARD
        yield from _gather(run, groups, call, hidden_behind, first=first)
        if run.counts_experts_first and not call.backward:
            yield from _gather(run, groups, replace(call, sizes_again=call.sizes), Hidden.FORWARD, first=first)


def _gather(
    run: Sharding, groups: _Groups, call: GatherCall, hidden_behind: Hidden, *, first: bool
) -> Iterator[Collective]:
    """One call of DeepSpeed's: with hpZ two collectives, if only some of the parameters have a copy in the node."""
    hpz = run.zero.zero_hpz_partition_size
    new, again = (call.sizes_new, call.sizes_again) if first else ((), call.sizes)
    if hpz == 1:
        new, again = call.sizes, ()
    itemsize = 1 if run.zero.zero_quantized_weights else run.itemsize
    for sizes, group, purpose in ((new, groups.replica, WEIGHTS), (again, groups.copies, COPIES)):
        if sizes:
            numel = sum(run.shard * -(-size // run.shard) for size in sizes)
            yield group(purpose, ALL_GATHER, itemsize * numel, hidden_behind)
            if run.zero.zero_quantized_weights:
                yield group(SCALES, ALL_GATHER, FLOAT32 * -(-numel // QUANTIZED_GROUP), hidden_behind)


def _reductions(run: Sharding, groups: _Groups) -> Iterator[Collective]:
    """DeepSpeed's buckets of gradients: the last norm's, each layer's from the last to the first, the embedding's."""
    (_, *layers, norm) = run.student.decay_order
    sizes = [*(size for part in (norm, *reversed(layers)) for size in part), run.embedding_size]
    buckets: list[list[int]] = [[]]
    for size in sizes:
        if buckets[-1] and sum(buckets[-1]) + size > run.zero.reduce_bucket_size:
            buckets.append([])
        buckets[-1].append(size)
    for bucket in buckets:
        whole = run.zero.contiguous_gradients and not run.zero.reduce_scatter
        if whole and sum(bucket) <= run.zero.reduce_bucket_size:
            kind, numel = ALL_REDUCE, sum(bucket)
        else:
            kind, numel = REDUCE_SCATTER, sum(run.shard * -(-size // run.shard) for size in bucket)
        hidden_behind = Hidden.NOTHING if bucket is buckets[-1] else Hidden.BACKWARD
        yield groups.replica(GRADIENTS, kind, run.reduce_itemsize * numel, hidden_behind)


def _loss(run: Sharding, groups: _Groups) -> Iterator[Collective]:
    """Over the vocab group, in a micro-step: metadata, labels and weights, and for each chunk its hidden states, the
    statistics of its softmax, the gradients; last the sums of the terms. Of several teachers for the mean of its rows.
    """
    p, live = run.group_size, run.teacher is not None
    recipe = run.recipe.loss
    passes: list[tuple[int, bool]] = []  # (heads, whether it has gradients)
    if live and (recipe.label_fraction > 0 or recipe.targets is not None):
        passes.append((1, False))
    passes.append((run.heads, True))
    yield groups.vocab(LOSS, ALL_GATHER, p * LOSS_METADATA * FLOAT64)
    for itemsize in (FLOAT64, FLOAT32):  # labels, weights
        yield groups.vocab(LOSS, ALL_GATHER, p * run.tokens_with_teacher * itemsize)
    for heads, with_gradient in passes:
        for span in run.chunks_of(run.tokens_with_teacher).spans():
            n = p * (span.stop - span.start)
            widths = [run.student.width, run.live_teacher.width][-heads:] if live else [run.student.width]
            for width in widths:
                yield groups.vocab(LOSS, ALL_GATHER, run.itemsize * n * width)
            yield groups.vocab(LOSS, ALL_GATHER, p * n * heads * SLICE_STATS * FLOAT32)
            if with_gradient:
                yield groups.vocab(LOSS, REDUCE_SCATTER, FLOAT32 * n * run.student.width)
    if run.stats.teacher_name is not None:
        yield groups.vocab(LOSS, ALL_REDUCE, p * run.tokens_with_teacher * PER_TOKEN_TERMS * FLOAT32)
    yield groups.vocab(LOSS, ALL_REDUCE, p * SLICE_TERMS * FLOAT32)


def _once(run: Sharding, groups: _Groups) -> Iterator[Collective]:
    """Calls of the step: the head's rows and their gradient, the control calls, the gradient across replicas, and small
    parameters after it."""
    rows = run.rows * run.student.width
    yield groups.slice(HEAD_ROWS, ALL_GATHER, run.itemsize * rows)
    yield groups.slice(HEAD_GRADIENT, REDUCE_SCATTER, FLOAT32 * rows)
    yield from groups.run_wide(TOKENS, ALL_REDUCE, FLOAT64)
    by_teacher = len(run.recipe.teachers) * max(1, len(run.recipe.data.sources)) * (1 + len(PER_TOKEN_NAMES))
    yield from groups.run_wide(NUMBERS, ALL_REDUCE, FLOAT64 * (len(METRIC_NAMES) + by_teacher))
    yield groups.across(ACROSS, ALL_REDUCE, FLOAT32 * run.partition_size)
    yield groups.replica(NORM, ALL_REDUCE, FLOAT64)
    if run.persistent_sizes:
        numel = sum(run.shard * -(-size // run.shard) for size in run.persistent_sizes)
        yield groups.replica(SMALL, ALL_REDUCE, run.itemsize * numel)
