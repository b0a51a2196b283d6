"""How a recipe may be laid out on a cluster: what may be chosen, and the recipe that says so. Arithmetic alone.

A run refuses layouts by the checks of `comm`, `config` and `student`; the same ones are asked here.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from megadistill.accelerators import Accelerator
from megadistill.config import Recipe, dotted, validate_recipe
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Launch, vocab_group_size
from megadistill.distributed.vocab import block_cyclic_ranges, padded_vocabulary
from megadistill.errors import UserError
from megadistill.plan.plan_input import Subject
from megadistill.student.deepspeed_config import deepspeed_config

LARGEST_GROUP_NODES = 4
"""A vocab group exchanges hidden states of all its ranks: it leaves a node only for the stages of a colocated teacher
that is too large for one, and then not for more nodes than that."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind, a process on each GPU.

    Raises:
        UserError: it has none.
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
    """What a search may choose."""

    vocab_group: int
    micro_batch: int
    activation_checkpointing: bool
    teacher_ranks: int = 0
    """Of its own; 0: none, or colocated."""
    stages: int = 0
    """Of a teacher's pipeline on ranks of its own."""


@dataclass(frozen=True)
class Placed:
    """A recipe on a cluster that nothing refuses."""

    recipe: Recipe
    roles: Roles | None
    students: int
    group_size: int
    accumulation: int

    @property
    def stages(self) -> int:
        return self.group_size if self.roles is None else self.roles.stages


def placed(recipe: Recipe, subject: Subject, cluster: Cluster) -> Placed:
    """Asked as a run asks before it starts.

    Raises:
        UserError: the ranks, the batch, the vocabulary or the teacher's layers do not divide so.
    """
    section = recipe.teacher
    roles = None
    if section is not None and section.placement == "disaggregated":
        assert section.ranks is not None
        roles = Roles(cluster.ranks, section.ranks, section.stages or section.ranks)
    students = cluster.ranks if roles is None else roles.students
    launch = Launch(rank=0, world=students, local_rank=0, local_world=min(cluster.gpus_per_node, students))
    accumulation = recipe.accumulation(students)
    group_size = vocab_group_size(recipe.comm.vocab_group, launch)
    deepspeed_config(subject.profile, recipe.train, accumulation)
    padded = padded_vocabulary(subject.vocab_size, recipe.student.vocab_multiple)
    block_cyclic_ranges(padded, students, group_size, rank=0)
    found = Placed(recipe, roles, students, group_size, accumulation)
    if subject.teacher is not None and found.stages > subject.teacher.num_hidden_layers:
        raise UserError(
            f"the teacher is cut into {found.stages} stages, and has {subject.teacher.num_hidden_layers} layers"
        )
    return found


def layouts(subject: Subject, cluster: Cluster) -> Iterator[Layout]:
    """Every layout worth asking about, in no order; `placed` may still refuse one."""
    yield from _with_group(subject, cluster, cluster.ranks)
    if subject.teacher is None:
        return
    unit = cluster.gpus_per_node if cluster.nodes > 1 else 1  # nodes have one role each, but where there is one node
    for teachers in range(unit, cluster.ranks, unit):
        students = cluster.ranks - teachers
        if subject.recipe.train.global_batch % students:
            continue
        for stages in divisors(teachers):
            if stages <= subject.teacher.num_hidden_layers and students % (teachers // stages) == 0:
                yield from _with_group(subject, cluster, students, teachers, stages)


def _with_group(
    subject: Subject, cluster: Cluster, students: int, teachers: int = 0, stages: int = 0
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
        for micro in divisors(subject.recipe.train.global_batch // students):
            for again in (False, True):
                yield Layout(group, micro, again, teachers, stages)


def divisors(number: int) -> list[int]:
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return sorted({*small, *(number // part for part in small)})


def recipe_of(layout: Layout, recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe that asks for this layout, validated like any other."""
    values = recipe.snapshot()
    values["comm"]["vocab_group"] = layout.vocab_group
    values["train"]["micro_batch"] = layout.micro_batch
    values["student"]["activation_checkpointing"] = layout.activation_checkpointing
    if values["teacher"] is not None and values["teacher"]["source"] == "live":
        own = layout.teacher_ranks > 0
        values["teacher"].update(
            placement="disaggregated" if own else "colocated",
            ranks=layout.teacher_ranks if own else None,
            stages=layout.stages if own else None,
        )
        if own:
            clients = (cluster.ranks - layout.teacher_ranks) * layout.stages // layout.teacher_ranks
            values["teacher"]["queue"] = max(values["teacher"]["queue"], _queue(layout.stages, clients))
        else:
            values["teacher"].update(queue=4, wire="whole")
    return validate_recipe(values, source=f"{asdict(layout)}")


def _queue(stages: int, clients: int) -> int:
    """Rounds that keep all stages at work: those that an answer takes, and one that is being used."""
    return -(-(stages + clients - 1) // clients) + 1


def overrides(proposed: Recipe, recipe: Recipe) -> list[str]:
    """The `--set` that make `recipe` the one that is proposed."""
    old, new = dotted(recipe.snapshot()), dotted(proposed.snapshot())
    return [f"{key}={_spelled(value)}" for key, value in new.items() if old.get(key) != value]


def _spelled(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
