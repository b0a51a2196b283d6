"""Bytes that a rank receives over each link, for each token of its micro-batch.

In a collective over q ranks a rank receives (q-1)/q of the bytes that are gathered or reduced. A ring passes through
the q' ranks of a node one after the other, so one in q' of its links leaves the node, and over NCCL's many rings each
rank has the same part of that. Point-to-point messages cross nodes where their ends are on two nodes. Where ranks
differ, the rank that receives most is counted.

Legend: as in `plan.counts.sharding`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megadistill.accelerators import Accelerator
from megadistill.loss.softmax import SLICE_STATS
from megadistill.models.attention.choice import query_width, value_width
from megadistill.models.attention.sequence import key_copies
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs
from megadistill.plan.counts.model_stats import ModelStats
from megadistill.plan.counts.sharding import FLOAT32, Sharding

INT64 = 8
"""Bytes of an int64."""
PER_TOKEN_TERMS = 3
"""Numbers of a token that the vocab group adds up where there are several teachers."""


@dataclass(frozen=True)
class Link:
    """Bytes that a rank receives for each token."""

    node: float
    """Bytes from ranks of its own node."""
    network: float
    """Bytes from other nodes."""

    @property
    def received(self) -> float:
        return self.node + self.network

    def seconds(self, accelerator: Accelerator) -> float:
        """Time for a token; the slower of the two kinds of link sets it."""
        return max(self.node / accelerator.node_bandwidth, self.network / accelerator.network_bandwidth)


NO_TRAFFIC = Link(0.0, 0.0)

GATHERS, REDUCES = "ZeRO-3 weights, both passes", "ZeRO-3 gradients"
ACROSS = "gradients across replicas, once a step"
HEAD = "head rows and their gradient, once a step"
VOCABULARY = "hidden states and their gradient, in the loss"
SHARED, TEACHER_SHARED = "heads and tokens, in the student's attention", "heads and tokens, in the teacher's attention"
STAGES, ANSWERS, REQUESTS = "teacher, from stage to stage", "teacher's answers", "requests to the teacher"
"""Names of the links."""


def student_traffic(run: Sharding) -> dict[str, Link]:
    """Traffic of a student's rank: name -> link."""
    gradients = run.reduce_itemsize * run.reduced
    links = {
        GATHERS: _weights(run),
        REDUCES: _ring(run, gradients / run.tokens, run.shard, stride=1),
        ACROSS: _across(run),
        HEAD: _head(run),
        VOCABULARY: _by_share(run.each_teacher, _vocabulary),
        SHARED: _all_to_all(run, run.student, passes=2 + run.checkpoints + run.counts_experts_first),
    }
    if run.teacher is not None and run.roles is not None:
        float8 = run.teacher_section.transfer_dtype == "float8"
        token = run.teacher.width + FLOAT32 if float8 else run.itemsize * run.teacher.width
        links[ANSWERS] = _between_roles(run, token + 2 * INT64 * run.sequences / run.tokens)
    elif run.teacher is not None:
        links[TEACHER_SHARED] = _all_to_all(run, run.teacher, passes=1)
    if run.teacher is not None and run.roles is None and run.stages > 1:
        links[STAGES] = _by_share(run.live_teachers, _stages)
        links[ANSWERS] = _by_share(run.live_teachers, _answers)
    return {name: link for name, link in links.items() if link.received}


def _by_share(runs: Sequence[Sharding], link_of: Callable[[Sharding], Link]) -> Link:
    """Traffic of a token in the mean: the sum of the teachers', each for its share of the tokens."""
    links = [(each.stats.share, link_of(each)) for each in runs]
    return Link(sum(share * link.node for share, link in links), sum(share * link.network for share, link in links))


def _stages(run: Sharding) -> Link:
    """A round is a micro-batch of each rank of the group; each rank gets its own packet from the last stage."""
    return _between_stages(run, run.stages * (run.itemsize * run.live_teacher.packet_width + _digests(run)))


def _answers(run: Sharding) -> Link:
    return _between_stages(run, run.itemsize * run.live_teacher.width + _digests(run))


def _digests(run: Sharding) -> float:
    return INT64 * run.sequences / run.tokens


def teacher_traffic(run: Sharding) -> dict[str, Link]:
    """Traffic of a teacher's own rank, for each token that passes through it."""
    if run.roles is None or run.teacher is None:
        return {}
    copies = 2 if run.recipe.data.document_mask else 1
    links = {REQUESTS: _between_roles(run, INT64 * (1 + run.sequences) / run.tokens + INT64 * copies)}
    if run.stages > 1:
        copies = run.recipe.data.document_mask + has_per_layer_inputs(run.teacher.config)  # positions, tokens
        numbers = 1 + 2 * run.sequences + copies * run.tokens
        links[STAGES] = _between_stages(run, run.itemsize * run.teacher.packet_width + INT64 * numbers / run.tokens)
    return links


def _weights(run: Sharding) -> Link:
    """Weights gathered in both passes; with hpZ once a step from all ranks, else from the copy in the node.

    A pass that counts the experts' tokens first is one more forward pass.
    """
    forward, backward = run.gathered.forward / run.tokens, run.gathered.backward / run.tokens
    passes = 2 if run.counts_experts_first else 1
    itemsize = 1 if run.zero.zero_quantized_weights else run.itemsize
    small = 2 * run.itemsize * run.persistent / (run.tokens * run.accumulation)  # an all-reduce after each update
    if run.zero.zero_hpz_partition_size == 1:
        return _ring(run, itemsize * (passes * forward + backward) + small, run.shard, stride=1)
    everywhere = _ring(run, itemsize * forward / run.accumulation + small, run.shard, stride=1)
    rest = run.itemsize * (backward + forward * (passes - 1 / run.accumulation))
    copies = _ring(run, rest, run.zero.zero_hpz_partition_size, stride=1)
    return Link(everywhere.node + copies.node, everywhere.network + copies.network)


def _across(run: Sharding) -> Link:
    """An all-reduce of a rank's flat gradient, in float32, over the ranks with the same shard: `student.flat_step`."""
    size = 2 * FLOAT32 * run.partition_size / (run.tokens * run.accumulation)
    return _ring(run, size, run.replicas, stride=run.shard)


def _head(run: Sharding) -> Link:
    """Over a replica's ranks with the same place in their vocab groups: gathered in the run's precision, reduced in
    float32."""
    window = run.tokens * run.accumulation
    size = (run.itemsize + FLOAT32) * run.rows * run.student.width / window
    return _ring(run, size, run.shard // run.group_size, stride=run.group_size)


def _vocabulary(run: Sharding) -> Link:
    """Traffic of the vocab group for each token: hidden states and statistics to all ranks, gradients back."""
    p, width = run.group_size, run.student.width
    own: float = run.itemsize * width + FLOAT32 * width + INT64 + FLOAT32
    if run.teacher is not None and run.heads == 2:
        own += run.itemsize * run.teacher.width
    own += p * run.heads * SLICE_STATS * FLOAT32
    if run.teacher is not None and run.recipe.loss.label_fraction > 0:  # a pass to find the lowest entropies
        own += run.itemsize * run.teacher.width + p * SLICE_STATS * FLOAT32
    if run.recipe.loss.targets is not None:
        own += _targets(run)
    if run.stats.teacher_name is not None:  # terms of each token: an all-reduce
        own += 2 * PER_TOKEN_TERMS * FLOAT32
    return _ring(run, own * p, p, stride=1)


def _all_to_all(run: Sharding, model: ModelStats, *, passes: int) -> Link:
    """Traffic of a model's attention over the ranks that share sequences: queries, keys and values of all heads for
    each token, and what its heads give. The stages of a pipeline work for all its ranks, so on a mean all layers do."""
    n, config = run.sequence_ranks, model.config
    if n == 1:
        return Link(0, 0)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    key_heads *= key_copies(heads, key_heads, n)
    columns = (heads + key_heads) * (query_width(config) + value_width(config))
    size = passes * run.itemsize * model.layers * columns / n  # from each rank, this one included
    in_node = max(1, min(n, run.ranks_per_node // run.group_size))
    return Link(size * (in_node - 1), size * (n - in_node))


def _targets(run: Sharding) -> float:
    """Most bytes of a token's truncated targets, sent to all ranks of the group, and of making them.

    Making them (`loss.sparse`) takes the teacher's hidden states, and for draws a uniform number and an id of
    eight bytes each; else every slice's candidates with their logits, as many as a token keeps.
    """
    targets = run.recipe.loss.targets
    assert targets is not None
    ids = targets.draws or targets.k or targets.max_ids or 1 / (targets.epsilon or 1)
    making = 0.0
    if run.teacher is not None:
        each = 2 * INT64 if targets.draws is not None else 2 * FLOAT32 * run.group_size
        making = run.itemsize * run.teacher.width + each * ids
    return making + ids * (INT64 + FLOAT32) + FLOAT32


def _between_stages(run: Sharding, size: float) -> Link:
    """`size` bytes from the stage before, which is on another node for the first stage of a node."""
    return Link(0, size) if run.stages > run.ranks_per_node else Link(size, 0)


def _between_roles(run: Sharding, size: float) -> Link:
    """`size` bytes between student and teacher, which have nodes of their own unless one node holds both."""
    assert run.roles is not None
    return Link(size, 0) if run.roles.world <= run.ranks_per_node else Link(0, size)


def _ring(run: Sharding, size: float, ranks: int, *, stride: int) -> Link:
    """`size` bytes gathered or reduced over `ranks` ranks, every `stride`-th one of the launch."""
    received = size * (ranks - 1) / ranks
    in_node = max(1, min(ranks, run.ranks_per_node // stride))
    network = received / in_node if in_node < ranks else 0.0
    return Link(received - network, network)
