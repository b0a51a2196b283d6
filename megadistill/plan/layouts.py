"""Layouts of a recipe on a cluster: the choices, and the recipe of each. A run's own checks decide which are valid."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from megadistill.accelerators import Accelerator
from megadistill.config.load import dotted, validate_recipe
from megadistill.config.recipe import CHECKPOINTING, Checkpointing, Recipe
from megadistill.distributed.launch import Launch, replica_launch, vocab_group_size
from megadistill.distributed.roles import Roles
from megadistill.errors import UserError
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.zero import Zero
from megadistill.plan.plan_input import PlanInput
from megadistill.student.deepspeed_config import build_engine_config

LARGEST_GROUP_NODES = 4
"""Most nodes of a vocab group. It exchanges hidden states of all its ranks, so it leaves a node only for the stages of
a colocated teacher that is too large for one."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind, with a process on each GPU.

    Raises:
        UserError: there are none.
    """

    nodes: int
    gpus_per_node: int
    accelerator: Accelerator

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise UserError(f"{option} {value}: give at least 1")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Layout:
    """Choices of a search."""

    vocab_group: int
    micro_batch: int
    activation_checkpointing: Checkpointing
    teacher_ranks: int = 0
    """Ranks of the teacher's own; 0: no teacher, or a colocated one."""
    stages: int = 0
    """Pipeline stages of a teacher on ranks of its own; 0 otherwise."""
    shard: int = 0
    """Ranks of a replica of the student; 0: all of its ranks share one copy."""


def place(recipe: Recipe, inputs: PlanInput, cluster: Cluster) -> Sharding:
    """A recipe on a cluster, checked as a run checks it before it starts.

    Raises:
        UserError: the ranks, the replicas, the batch, the vocabulary or the teacher's layers do not divide so.
    """
    section = recipe.teacher
    roles = None
    if section is not None and section.placement == "disaggregated":
        assert section.ranks is not None
        roles = Roles(cluster.ranks, section.ranks, section.stages or section.ranks)
    students = cluster.ranks if roles is None else roles.students
    launch = Launch(rank=0, world=students, local_rank=0, local_world=min(cluster.gpus_per_node, students))
    distributed = recipe.distributed
    replica = replica_launch(distributed.shard, launch)
    of = "this run" if replica.world == students else "a replica of the student (distributed.shard)"
    run = Sharding(
        recipe,
        inputs.stats,
        vocab_size=inputs.vocab_size,
        ranks=students,
        ranks_per_node=cluster.gpus_per_node,
        group_size=vocab_group_size(distributed.vocab_group, replica, sequence=distributed.sequence, of=of),
        roles=roles,
        zero=Zero.of(inputs.deepspeed_config),
        replicas=students // replica.world,
    )
    build_engine_config(
        inputs.deepspeed_config,
        recipe.train,
        run.accumulation,
        ranks=run.shard,
        replicas=run.replicas,
    )
    for each in run.live_teachers:
        if run.stages > (layers := each.live_teacher.layers):
            which = " ".join(filter(None, ("the teacher", each.stats.teacher_name)))
            raise UserError(f"{which} is cut into {run.stages} stages, and has {layers} layers")
    return run


def layouts(inputs: PlanInput, cluster: Cluster) -> Iterator[Layout]:
    """Every layout worth counting, in no order; `place` may still refuse one.

    The student is one copy, which needs the least memory, and has the replicas of the recipe: `plan.search` looks for
    better numbers of ranks to a replica among the best of these.
    """
    yield from _with_group(inputs, cluster, cluster.ranks)
    if inputs.stats.teacher is None or inputs.stats.teacher_name is not None:  # several are colocated
        return
    step = cluster.gpus_per_node if cluster.nodes > 1 else 1  # each of several nodes has one role
    for teachers in range(step, cluster.ranks, step):
        students = cluster.ranks - teachers
        if inputs.recipe.train.global_batch * inputs.recipe.distributed.sequence % students:
            continue
        for stages in divisors(teachers):
            if stages <= inputs.stats.teacher.layers and students % (teachers // stages) == 0:
                yield from _with_group(inputs, cluster, students, teachers, stages)


def _with_group(
    inputs: PlanInput, cluster: Cluster, students: int, teachers: int = 0, stages: int = 0
) -> Iterator[Layout]:
    for group in divisors(students):
        within = cluster.nodes == 1 or cluster.gpus_per_node % group == 0
        over = (
            teachers == 0
            and group % cluster.gpus_per_node == 0
            and group <= LARGEST_GROUP_NODES * cluster.gpus_per_node
        )
        if not (within or over):
            continue
        for micro in divisors(inputs.recipe.train.global_batch * inputs.recipe.distributed.sequence // students):
            for recompute in CHECKPOINTING:
                for shard in sorted({0, inputs.recipe.distributed.shard or 0}):
                    yield Layout(group, micro, recompute, teachers, stages, shard)


def divisors(number: int) -> list[int]:
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return sorted({*small, *(number // part for part in small)})


def recipe_with_layout(layout: Layout, recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe of this layout, validated like any other."""
    values = recipe.snapshot()
    values["distributed"]["vocab_group"] = layout.vocab_group
    values["distributed"]["shard"] = layout.shard or None
    values["train"]["micro_batch"] = layout.micro_batch
    values["student"]["activation_checkpointing"] = layout.activation_checkpointing
    if recipe.teacher is not None and recipe.teacher.is_live:
        own = layout.teacher_ranks > 0
        values["teacher"].update(
            placement="disaggregated" if own else "colocated",
            ranks=layout.teacher_ranks if own else None,
            stages=layout.stages if own else None,
        )
        if own:
            # Rounds that keep all stages busy: those in the pipeline, and the one in use.
            clients = (cluster.ranks - layout.teacher_ranks) * layout.stages // layout.teacher_ranks
            rounds = math.ceil((layout.stages + clients - 1) / clients) + 1
            values["teacher"]["queue"] = max(values["teacher"]["queue"], rounds)
        else:
            values["teacher"].update(queue=4, transfer_dtype="native")
    return validate_recipe(values, source=f"{asdict(layout)}")


def overrides(proposed: Recipe, recipe: Recipe) -> list[str]:
    """The `--set` options that turn `recipe` into the proposed one."""
    old, new = dotted(recipe.snapshot()), dotted(proposed.snapshot())
    changed = {key: value for key, value in new.items() if old.get(key) != value}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
