"""What a recipe needs on a number of ranks: parameters, FLOPs, memory, bytes. It knows no hardware and starts nothing.

`measure_models` counts the models once; `needs` is arithmetic, quick enough to be asked for thousands of layouts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadistill.config import Recipe
from megadistill.data import Mixture
from megadistill.distributed.roles import Roles
from megadistill.models.flops import Flops, ParameterCounts
from megadistill.plan.counts.disk_usage import TargetBytes, checkpoint_bytes, target_bytes
from megadistill.plan.counts.memory import Lines, host_memory, student_memory, teacher_memory
from megadistill.plan.counts.model_stats import ModelStats, RecipeStats, measure_models
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.traffic import Link, student_traffic, teacher_traffic
from megadistill.plan.counts.zero import Zero


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a token of the run. A backward pass costs twice a forward pass."""

    body: int
    head: int
    attention: int
    recompute: int
    """Of what is computed a second time: the student's layers with activation checkpointing, the teacher's head where
    the surest tokens are looked for first."""

    @property
    def total(self) -> int:
        return self.body + self.head + self.attention + self.recompute


@dataclass(frozen=True)
class ModelRequirements:
    """One model."""

    role: str
    parameters: ParameterCounts
    forward: Flops
    """Of one token."""
    work: Work
    """Three forward passes to train, one to teach. A teacher's head is computed by the student's ranks."""

    @property
    def flops(self) -> int:
        return self.work.total


@dataclass(frozen=True)
class Requirements:
    """What a recipe needs."""

    ranks: int
    """The student's."""
    group_size: int
    accumulation: int
    tokens: int
    """Of the whole run."""
    models: tuple[ModelRequirements, ...]
    """The student, and the teacher where one is in memory."""
    phases: dict[str, Lines]
    """Of a student's rank: what its device holds in each phase of a step (`plan.memory.student_memory`)."""
    host: Lines
    """Bytes on the host, of the same rank."""
    teacher_memory: Lines
    """Bytes on the device of one of the teacher's own ranks; nothing where it has none."""
    traffic: dict[str, Link]
    """Bytes that a student's rank receives for each token of its micro-batch."""
    teacher_traffic: dict[str, Link]
    """Bytes that a teacher's own rank receives for each token that passes through it."""
    stage_costs: tuple[int, ...]
    """Active parameters of each stage of the teacher: a token's FLOPs in it are twice as many, attention aside."""
    checkpoint_bytes: int
    target_bytes: TargetBytes | None
    """Of `loss.targets`, where the recipe has them."""

    @property
    def phase(self) -> str:
        """The one that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def memory(self) -> Lines:
        """Bytes on the device of one of the student's ranks in the phase that takes most."""
        return self.phases[self.phase]

    @property
    def flops_per_token(self) -> int:
        return sum(model.flops for model in self.models)


def rank_memory(
    recipe: Recipe,
    *,
    student: Any,
    teacher: Any | None,
    data: Mixture,
    rank: int,
    ranks: int,
    group_size: int,
    roles: Roles | None,
    profile: Mapping[str, Any],
) -> dict[str, Lines]:
    """Bytes that rank `rank` of a launch will hold, by what holds them, on its `device` and on its `host`.

    `ranks` are the student's; see `needs`.
    """
    found = needs(
        recipe,
        measure_models(student, teacher, sequence_length=data.sequence_length),
        vocab_size=data.vocab_size,
        ranks=ranks,
        ranks_per_node=ranks,
        group_size=group_size,
        roles=roles,
        profile=profile,
    )
    if rank >= ranks:
        return {"device": found.teacher_memory, "host": {}}
    return {"device": found.memory, "host": found.host}


def needs(
    recipe: Recipe,
    measured: RecipeStats,
    *,
    vocab_size: int,
    ranks: int,
    ranks_per_node: int,
    group_size: int,
    roles: Roles | None = None,
    profile: Mapping[str, Any] | None = None,
) -> Requirements:
    """The vocabulary is the data's. `ranks` are the student's, `ranks_per_node` those of a node of the launch.

    `roles`: of a teacher with ranks of its own. `profile`: DeepSpeed's settings; None: DeepSpeed's defaults.

    Raises:
        UserError: the batch or the vocabulary does not divide over the ranks, or the teacher has fewer layers than
            stages.
    """
    run = Sharding(recipe, measured, vocab_size, ranks, ranks_per_node, group_size, roles, Zero.of(profile or {}))
    models = [_model("student", measured.student, _trained(run))]
    if measured.teacher is not None:
        models.append(_model("teacher", measured.teacher, _taught(run, measured.teacher)))
    targets = recipe.loss.targets
    S = measured.student.sequence_length
    return Requirements(
        ranks=ranks,
        group_size=group_size,
        accumulation=run.accumulation,
        tokens=recipe.train.steps * recipe.train.global_batch * S,
        models=tuple(models),
        phases=student_memory(run),
        host=host_memory(run),
        teacher_memory=teacher_memory(run),
        traffic=student_traffic(run),
        teacher_traffic=teacher_traffic(run),
        stage_costs=measured.teacher.stage_costs(run.stages) if measured.teacher is not None else (),
        checkpoint_bytes=checkpoint_bytes(run),
        target_bytes=None if targets is None else target_bytes(targets, vocab_size=vocab_size, sequence_length=S),
    )


def _model(role: str, model: ModelStats, work: Work) -> ModelRequirements:
    return ModelRequirements(role, model.parameters, model.forward, work)


def _trained(run: Sharding) -> Work:
    once = run.student.forward
    recompute = once.body + once.attention if run.recipe.student.activation_checkpointing else 0
    return Work(3 * once.body, 3 * once.head, 3 * once.attention, recompute)


def _taught(run: Sharding, teacher: ModelStats) -> Work:
    once = teacher.forward
    return Work(once.body, once.head, once.attention, once.head if run.recipe.loss.label_fraction > 0 else 0)
