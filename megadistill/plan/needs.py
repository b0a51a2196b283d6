"""What a recipe needs on a number of ranks: parameters, FLOPs, memory, bytes. It knows no hardware and starts nothing.

`measure` counts the models once; `needs` is arithmetic, quick enough to be asked for thousands of layouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megadistill.comm.roles import Roles
from megadistill.comm.topology import Launch, vocab_group_size
from megadistill.config import Recipe, load_recipe
from megadistill.data import Mixture
from megadistill.errors import UserError
from megadistill.model.families import load_config
from megadistill.model.flops import Flops, ParameterCounts
from megadistill.plan.assignment import Assignment
from megadistill.plan.measured import Measured, MeasuredModel, measure
from megadistill.plan.memory import Lines, host_memory, student_memory, teacher_memory
from megadistill.plan.storage import TargetBytes, checkpoint_bytes, target_bytes
from megadistill.plan.traffic import Link, student_traffic, teacher_traffic
from megadistill.plan.zero import Zero
from megadistill.student.profile import load_deepspeed

__all__ = ["Measured", "Needs", "measure", "needs", "rank_memory", "read_needs", "readable", "tables"]


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
class ModelNeeds:
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
class Needs:
    """What a recipe needs."""

    ranks: int
    """The student's."""
    group_size: int
    accumulation: int
    tokens: int
    """Of the whole run."""
    models: tuple[ModelNeeds, ...]
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
    def wire(self) -> dict[str, int]:
        return {name: round(link.received) for name, link in self.traffic.items()}

    @property
    def flops_per_token(self) -> int:
        return sum(model.flops for model in self.models)


def read_needs(path: Path, overrides: Sequence[str], *, ranks: int) -> Needs:
    """The needs of a recipe file and of what it names, with every rank on one node. `ranks`: the teacher's own, too.

    Raises:
        UserError: the recipe, its data or its models are wrong, or do not divide over the ranks.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: a run needs at least one")
    recipe = load_recipe(path, overrides)
    data = Mixture.load(recipe.data)
    source = recipe.student.config
    student = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    student.vocab_size = data.vocab_size
    teacher = None
    if recipe.teacher is not None and recipe.teacher.source == "live":
        assert recipe.teacher.path is not None
        teacher = load_config(Path(recipe.teacher.path), what="teacher.path")
    roles = None
    if recipe.teacher is not None and recipe.teacher.placement == "disaggregated":
        assert recipe.teacher.ranks is not None
        roles = Roles(ranks, recipe.teacher.ranks, recipe.teacher.stages or recipe.teacher.ranks)
        ranks = roles.students
    launch = Launch(rank=0, world=ranks, local_rank=0, local_world=ranks)
    return needs(
        recipe,
        measure(student, teacher, sequence_length=data.sequence_length),
        vocab_size=data.vocab_size,
        ranks=ranks,
        ranks_per_node=ranks if roles is None else roles.world,
        group_size=vocab_group_size(recipe.comm.vocab_group, launch),
        roles=roles,
        profile=load_deepspeed(Path(recipe.student.deepspeed)),
    )


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
        measure(student, teacher, sequence_length=data.sequence_length),
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
    measured: Measured,
    *,
    vocab_size: int,
    ranks: int,
    ranks_per_node: int,
    group_size: int,
    roles: Roles | None = None,
    profile: Mapping[str, Any] | None = None,
) -> Needs:
    """The vocabulary is the data's. `ranks` are the student's, `ranks_per_node` those of a node of the launch.

    `roles`: of a teacher with ranks of its own. `profile`: DeepSpeed's settings; None: DeepSpeed's defaults.

    Raises:
        UserError: the batch or the vocabulary does not divide over the ranks, or the teacher has fewer layers than
            stages.
    """
    run = Assignment(recipe, measured, vocab_size, ranks, ranks_per_node, group_size, roles, Zero.of(profile or {}))
    models = [_model("student", measured.student, _trained(run))]
    if measured.teacher is not None:
        models.append(_model("teacher", measured.teacher, _taught(run, measured.teacher)))
    targets = recipe.loss.targets
    S = measured.student.sequence_length
    return Needs(
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


def _model(role: str, model: MeasuredModel, work: Work) -> ModelNeeds:
    return ModelNeeds(role, model.parameters, model.forward, work)


def _trained(run: Assignment) -> Work:
    once = run.student.forward
    again = once.body + once.attention if run.recipe.student.activation_checkpointing else 0
    return Work(3 * once.body, 3 * once.head, 3 * once.attention, again)


def _taught(run: Assignment, teacher: MeasuredModel) -> Work:
    once = teacher.forward
    return Work(once.body, once.head, once.attention, once.head if run.recipe.loss.label_fraction > 0 else 0)


def tables(found: Needs) -> list[Table]:
    """Models, memory and traffic, for a person."""
    shown = {"memory of a rank": found.memory, "memory of its host": found.host, "received a token": found.wire}
    if found.teacher_memory:
        shown["memory of a teacher's rank"] = found.teacher_memory
    return [_models(found), *(_amounts(title, amounts) for title, amounts in shown.items())]


def _models(found: Needs) -> Table:
    total = found.flops_per_token * found.tokens
    table = Table(
        title=f"{found.ranks} ranks, vocabulary and teacher over {found.group_size}, accumulation {found.accumulation}",
        caption=f"{found.tokens:,} tokens x {readable(found.flops_per_token, 'FLOP')} = {total:.3g} FLOP",
    )
    for heading in ("model", "parameters", "body", "embedding", "head", "forward", "a token"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for model in found.models:
        counts = model.parameters
        sizes = (counts.total, counts.body, counts.embedding, counts.head)
        work = (model.forward.forward, model.flops)
        table.add_row(model.role, *(readable(size, "") for size in sizes), *(readable(flops, "FLOP") for flops in work))
    return table


def _amounts(title: str, amounts: dict[str, int]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column("what")
    table.add_column("bytes", justify="right")
    rows: Sequence[tuple[str, int]] = sorted(amounts.items(), key=lambda item: -item[1])
    for what, amount in rows:
        table.add_row(what, readable(amount, "B"))
    table.add_section()
    table.add_row("together", readable(sum(amounts.values()), "B"))
    return table


def readable(amount: float, unit: str) -> str:
    """Three significant digits with a decimal prefix: `8.03 G`, `16.1 GB`."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while amount >= 999.5 and len(prefixes) > 1:
        amount /= 1000
        prefixes.pop(0)
    return f"{amount:.3g} {prefixes[0]}{unit}".rstrip()
