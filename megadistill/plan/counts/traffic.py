"""Bytes on the links of a run, a token of a student's rank's micro-batch. Arithmetic alone.

Of a collective over q ranks a rank receives, and sends, what the others give and not its own: (q-1)/q of what is
gathered or reduced. How much of that crosses between nodes is a ring's share: a ring goes through the q' ranks of a
node one after the other, so one in q' of its links leaves the node, and over the many rings that NCCL makes each rank
has the same part of it. Point-to-point messages cross where their ends are on two nodes. A link that not all ranks have
alike is that of the rank that receives most.

Legend: as in `plan.assignment`.
"""

from dataclasses import dataclass

from megadistill.plan.counts.memory import STATISTICS
from megadistill.plan.counts.sharding import FLOAT32, Sharding

INT64 = 8


@dataclass(frozen=True)
class Link:
    """Bytes a token that a rank receives."""

    node: float
    """From ranks of its own node."""
    network: float
    """From other nodes."""

    @property
    def received(self) -> float:
        return self.node + self.network


GATHERS, REDUCES = "ZeRO-3 weights, both passes", "ZeRO-3 gradients"
HEAD = "head rows and their gradient, once a step"
VOCABULARY = "hidden states and their gradient, in the loss"
STAGES, ANSWERS, REQUESTS = "teacher, from stage to stage", "teacher's answers", "requests to the teacher"
"""Links by name."""


def student_traffic(run: Sharding) -> dict[str, Link]:
    """What a student's rank receives, by name."""
    links = {
        GATHERS: _weights(run),
        REDUCES: _ring(run, _gradient_bytes(run) / run.tokens, run.ranks, stride=1),
        HEAD: _head(run),
        VOCABULARY: _vocabulary(run),
    }
    if run.teacher is not None:
        if run.roles is None:
            links[STAGES] = _stages(run)
            links[ANSWERS] = _scattered(run)
        else:
            links[ANSWERS] = _answered(run)
    return {name: link for name, link in links.items() if link.received}


def teacher_traffic(run: Sharding) -> dict[str, Link]:
    """What a teacher's own rank receives, a token that passes through it."""
    if run.roles is None or run.teacher is None:
        return {}
    copies = 2 if run.recipe.data.document_mask else 1
    request = (INT64 * (1 + run.sequences) / run.tokens) + INT64 * copies
    links = {REQUESTS: _apart(run, request)}
    if run.roles.stages > 1:
        numbers = 1 + 2 * run.sequences + (run.tokens if run.recipe.data.document_mask else 0)
        packet = run.element * run.teacher.width + INT64 * numbers / run.tokens
        links[STAGES] = _neighbours(run, packet, run.roles.stages)
    return links


def _weights(run: Sharding) -> Link:
    """GatheredParams in both passes; with a second partition in each node (hpZ), once a step from everywhere, else there."""
    element = 1 if run.zero.zero_quantized_weights else run.element
    forward, backward = (element * part / run.tokens for part in (run.gathered.forward, run.gathered.backward))
    if run.zero.zero_hpz_partition_size == 1:
        persistent = (
            run.element * run.persistent / (run.tokens * run.accumulation)
        )  # gathered anew when they have moved
        return _ring(run, forward + backward + persistent, run.ranks, stride=1)
    afar = _ring(run, forward / run.accumulation, run.ranks, stride=1)
    rest = run.element * (run.gathered.backward + run.gathered.forward * (1 - 1 / run.accumulation)) / run.tokens
    return _sum(afar, _ring(run, rest, run.zero.zero_hpz_partition_size, stride=1))


def _gradient_bytes(run: Sharding) -> float:
    if run.zero.zero_quantized_gradients:  # four bits within the node, and four bits of what is left between nodes
        return run.reduced / 2
    return (run.zero.reduce_element_bytes or run.element) * run.reduced


def _head(run: Sharding) -> Link:
    """Over the ranks with the same place in their vocab groups: gathered in the run's precision, reduced in float32."""
    window = run.tokens * run.accumulation
    each = (run.element + FLOAT32) * run.rows * run.student.width / window
    return _ring(run, each, run.ranks // run.group_size, stride=run.group_size)


def _vocabulary(run: Sharding) -> Link:
    """What a vocab group exchanges of each token: hidden states to all, statistics of all, gradients back."""
    p, width = run.group_size, run.student.width
    heads = run.heads
    own: float = run.element * width + FLOAT32 * width + INT64 + FLOAT32
    if run.teacher is not None and heads == 2:
        own += run.element * run.teacher.width
    own += p * heads * STATISTICS * FLOAT32
    if run.teacher is not None and run.recipe.loss.label_fraction > 0:  # one pass more, for the surest tokens
        own += run.element * run.teacher.width + p * STATISTICS * FLOAT32
    if run.recipe.loss.targets is not None:
        own += _targets(run)
    return _ring(run, own * p, p, stride=1)


def _targets(run: Sharding) -> float:
    """Truncated targets as they go to all ranks of the group, at most; and what making them takes (`loss.targets`).

    That is the teacher's hidden states, and for draws each one's uniform number and the id that it finds, in eight
    bytes; else every slice's most likely ids with their logits, of which each slice tells as many as are kept.
    """
    targets = run.recipe.loss.targets
    assert targets is not None
    kept = targets.draws or targets.k or targets.max_ids or 1 / (targets.epsilon or 1)
    made = 0.0
    if run.teacher is not None:
        each = 2 * INT64 if targets.draws is not None else 2 * FLOAT32 * run.group_size
        made = run.element * run.teacher.width + each * kept
    return made + kept * (INT64 + FLOAT32) + FLOAT32


def _stages(run: Sharding) -> Link:
    """A round is a micro-batch of each rank of the group: p packets go from a stage to the next."""
    assert run.teacher is not None
    if run.stages == 1:
        return Link(0, 0)
    return _neighbours(run, run.stages * _packet(run), run.stages)


def _scattered(run: Sharding) -> Link:
    """Each rank gets its own part from the last stage."""
    if run.stages == 1:
        return Link(0, 0)
    return Link(0, _packet(run)) if run.stages > run.ranks_per_node else Link(_packet(run), 0)


def _answered(run: Sharding) -> Link:
    assert run.teacher is not None
    assert run.recipe.teacher is not None
    small = run.recipe.teacher.transfer_dtype == "float8"
    token = run.teacher.width + FLOAT32 if small else run.element * run.teacher.width
    return _apart(run, token + 2 * INT64 * run.sequences / run.tokens)


def _packet(run: Sharding) -> float:
    assert run.teacher is not None
    return run.element * run.teacher.width + INT64 * run.sequences / run.tokens


def _neighbours(run: Sharding, size: float, stages: int) -> Link:
    """From the stage before: the first stage of a node hears from another node."""
    return Link(0, size) if stages > run.ranks_per_node else Link(size, 0)


def _apart(run: Sharding, size: float) -> Link:
    """Between student and teacher, which are on nodes of their own but where one node holds both."""
    assert run.roles is not None
    return Link(size, 0) if run.roles.world <= run.ranks_per_node else Link(0, size)


def _ring(run: Sharding, size: float, ranks: int, *, stride: int) -> Link:
    """`size`: what is gathered or reduced, a token. Every `stride`-th rank of the launch is one of the `ranks`."""
    received = size * (ranks - 1) / ranks
    together = max(1, min(ranks, run.ranks_per_node // stride))
    network = received / together if together < ranks else 0.0
    return Link(received - network, network)


def _sum(a: Link, b: Link) -> Link:
    return Link(a.node + b.node, a.network + b.network)
