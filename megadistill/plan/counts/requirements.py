"""Requirements of a sharded recipe: parameters, FLOPs, memory and bytes, whatever the hardware.

Arithmetic on models that are measured once, quick enough for thousands of layouts.
"""

from dataclasses import dataclass

from megadistill.models.flops import Flops, ParameterCounts
from megadistill.plan.counts.disk_usage import TargetBytes, checkpoint_bytes, target_bytes
from megadistill.plan.counts.memory import Lines, host_memory, student_memory, teacher_memory
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.traffic import Link, student_traffic, teacher_traffic


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations for a token of the run. A backward pass costs twice a forward pass."""

    body: int
    head: int
    attention: int
    recompute: int
    """FLOPs of a second forward pass: the student's layers with activation checkpointing, and where the tokens of its
    experts are counted first (then perhaps a third); the teacher's head where the tokens of lowest entropy are selected
    first."""

    @property
    def total(self) -> int:
        return self.body + self.head + self.attention + self.recompute


@dataclass(frozen=True)
class ModelRequirements:
    """One model of a run."""

    role: str
    """student or teacher; of several teachers with its name."""
    parameters: ParameterCounts
    forward: Flops
    """FLOPs of one token's forward pass."""
    work: TokenFlops
    """Three forward passes for the student, one for the teacher, whose head is computed by the student's ranks. Of
    several teachers each has its `share` of them, and the student's head as many as a token has teachers."""
    share: float = 1.0
    """Fraction of the run's tokens that the model reads."""

    @property
    def flops(self) -> int:
        return self.work.total


@dataclass(frozen=True)
class Requirements:
    """Requirements of a sharded recipe."""

    tokens: int
    """Tokens that the run reads."""
    earlier_tokens: int
    """Tokens, by this recipe's batch, of the steps before `run.begin_from`."""
    models: tuple[ModelRequirements, ...]
    """The student, and the teachers that are in memory."""
    phases: dict[str, Lines]
    """Bytes on a student's device in each phase of a step (`plan.counts.memory.student_memory`)."""
    host: Lines
    """Bytes on the host of a student's rank."""
    teacher_memory: Lines
    """Bytes on the device of a teacher's own rank; empty where it has none."""
    traffic: dict[str, Link]
    """Bytes that a student's rank receives for each token of its micro-batch."""
    teacher_traffic: dict[str, Link]
    """Bytes that a teacher's own rank receives for each token that passes through it."""
    checkpoint_bytes: int
    target_bytes: TargetBytes | None
    """Bytes of a token's targets, for a recipe with `loss.targets`."""

    @property
    def phase(self) -> str:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def memory(self) -> Lines:
        """Bytes on a student's device in the phase that takes most."""
        return self.phases[self.phase]

    @property
    def flops_per_token(self) -> int:
        return sum(model.flops for model in self.models)


def count_requirements(run: Sharding) -> Requirements:
    """Raises UserError: the teacher has fewer layers than stages."""
    targets, S = run.recipe.loss.targets, run.stats.sequence_length
    return Requirements(
        tokens=run.steps * run.recipe.train.global_batch * S,
        earlier_tokens=run.stats.first_step * run.recipe.train.global_batch * S,
        models=_models(run),
        phases=student_memory(run),
        host=host_memory(run),
        teacher_memory=teacher_memory(run),
        traffic=student_traffic(run),
        teacher_traffic=teacher_traffic(run),
        checkpoint_bytes=checkpoint_bytes(run),
        target_bytes=None if targets is None else target_bytes(targets, vocab_size=run.vocab_size, sequence_length=S),
    )


def _models(run: Sharding) -> tuple[ModelRequirements, ...]:
    model, once = run.student, run.student.forward
    layers_again = run.recomputes + run.counts_experts_first
    head = 3 * round(run.loss_passes * once.head)
    work = TokenFlops(3 * once.body, head, 3 * once.attention, layers_again * (once.body + once.attention))
    models = [ModelRequirements("student", model.parameters, once, work)]
    for each in run.live_teachers:
        model, once, share = each.live_teacher, each.live_teacher.forward, each.stats.share
        again = once.head if run.recipe.loss.label_fraction > 0 else 0
        work = TokenFlops(*(round(share * part) for part in (once.body, once.head, once.attention, again)))
        role = " ".join(filter(None, ("teacher", each.stats.teacher_name)))
        models.append(ModelRequirements(role, model.parameters, once, work, share))
    return tuple(models)
