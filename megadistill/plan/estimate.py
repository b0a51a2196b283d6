"""What a layout comes to on a cluster: memory, seconds, GPU-hours. Arithmetic on what is counted elsewhere.

Links are as fast as the file of GPU kinds says, whatever the size of a message; a collective is paced by the slower of
its two kinds of link.
"""

from dataclasses import dataclass
from functools import cached_property

from megadistill.plan.counts.model_stats import Measured
from megadistill.plan.counts.requirements import Needs, needs
from megadistill.plan.counts.traffic import ANSWERS, GATHERS, HEAD, REDUCES, STAGES, VOCABULARY, Link
from megadistill.plan.layouts import Cluster, Layout, Placed
from megadistill.plan.plan_input import Subject
from megadistill.plan.throughput import Assumed, StepTimes, hiding_tokens

HOUR, DAY = 3600.0, 86400.0
NOTHING = Link(0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A recipe as it is laid out on a cluster."""

    placed: Placed
    cluster: Cluster
    needs: Needs
    times: StepTimes
    steps: int
    hiding_tokens: float
    """The smallest micro-step whose compute hides ZeRO-3's traffic."""
    hiding_tokens_apart: float
    """The same if nothing that a node receives were shared within it: every GPU fetches all of it by itself."""

    @property
    def layout(self) -> Layout:
        recipe, roles = self.placed.recipe, self.placed.roles
        return Layout(
            vocab_group=self.placed.group_size,
            micro_batch=recipe.train.micro_batch,
            activation_checkpointing=recipe.student.activation_checkpointing,
            teacher_ranks=0 if roles is None else roles.teachers,
            stages=0 if roles is None else roles.stages,
        )

    @cached_property
    def memory(self) -> int:
        """Bytes of the fullest device."""
        return max(sum(self.needs.memory.values()), sum(self.needs.teacher_memory.values()))

    @property
    def margin(self) -> int:
        """Bytes that are left there; negative where it does not fit."""
        return self.cluster.accelerator.memory_bytes - self.memory

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @cached_property
    def seconds(self) -> float:
        return self.times.seconds(self.steps)

    @property
    def tokens_per_second(self) -> float:
        return self.needs.tokens / self.steps / self.times.step

    @property
    def gpu_hours(self) -> float:
        return self.seconds / HOUR * self.cluster.ranks

    @property
    def days(self) -> float:
        return self.seconds / DAY


def estimate(placed: Placed, subject: Subject, measured: Measured, cluster: Cluster, assumed: Assumed) -> Estimate:
    """Of a layout that nothing refuses.

    Raises:
        UserError: the peak of the GPU at the recipe's precision is not known.
    """
    counted = needs(
        placed.recipe,
        measured,
        vocab_size=subject.vocab_size,
        ranks=placed.students,
        ranks_per_node=cluster.gpus_per_node,
        group_size=placed.group_size,
        roles=placed.roles,
        profile=subject.profile,
    )
    peak = cluster.accelerator.peak_flops(placed.recipe.train.precision)
    times = step_times(placed, counted, measured, cluster, assumed, peak)
    tokens = _micro_tokens(placed, subject)
    compute, traffic = times.compute, times.gather + times.reduce
    received = sum(counted.traffic.get(name, NOTHING).received for name in (GATHERS, REDUCES)) * tokens
    bandwidth = cluster.accelerator.network_bandwidth if cluster.nodes > 1 else cluster.accelerator.node_bandwidth
    apart = hiding_tokens(
        traffic=received, bandwidth=bandwidth, flops=counted.models[0].flops, mfu=assumed.student_mfu, peak=peak
    )
    return Estimate(
        placed=placed,
        cluster=cluster,
        needs=counted,
        times=times,
        steps=placed.recipe.train.steps,
        hiding_tokens=tokens * traffic / compute,
        hiding_tokens_apart=apart,
    )


def step_times(
    placed: Placed, counted: Needs, measured: Measured, cluster: Cluster, assumed: Assumed, peak: float
) -> StepTimes:
    """`peak`: of one GPU, FLOP/s."""
    student = counted.models[0]
    tokens = placed.recipe.train.micro_batch * measured.student.sequence_length
    second, read = tokens / (assumed.student_mfu * peak), tokens / (assumed.teacher_mfu * peak)
    frozen = counted.models[1].work if len(counted.models) > 1 else None
    teachers_head = read * (frozen.head + frozen.recompute) if frozen is not None else 0.0
    forward, section = student.forward.forward, placed.recipe.teacher

    def spent(name: str) -> float:
        link = counted.traffic.get(name, NOTHING)
        by_node = link.node / cluster.accelerator.node_bandwidth
        return tokens * max(by_node, link.network / cluster.accelerator.network_bandwidth)

    if placed.roles is None:
        parcel = spent(STAGES) / placed.group_size
    else:
        passing = counted.teacher_traffic.get(STAGES, NOTHING)
        by_node = passing.node / cluster.accelerator.node_bandwidth
        parcel = tokens * max(by_node, passing.network / cluster.accelerator.network_bandwidth)
    return StepTimes(
        students=placed.students,
        micro_steps=placed.accumulation,
        student_forward=second * forward + teachers_head,
        student_backward=second * (student.flops - forward),
        gather=spent(GATHERS),
        reduce=spent(REDUCES),
        vocabulary=spent(VOCABULARY) + spent(HEAD),
        stages=_stage_seconds(placed, measured, read),
        parcel=parcel,
        answer=spent(ANSWERS),
        replicas=0 if placed.roles is None else placed.roles.replicas,
        queue=1 if placed.roles is None or section is None else section.queue,
    )


def _stage_seconds(placed: Placed, measured: Measured, read: float) -> tuple[float, ...]:
    """Layers' products, and attention by the number of layers. `read`: seconds a FLOP-a-token of a micro-batch."""
    teacher = measured.teacher
    if teacher is None:
        return ()
    attention = teacher.forward.attention / teacher.layers
    costs, sizes = teacher.stage_costs(placed.stages), teacher.stage_sizes(placed.stages)
    return tuple(read * (2 * cost + attention * size) for cost, size in zip(costs, sizes, strict=True))


def _micro_tokens(placed: Placed, subject: Subject) -> int:
    return placed.recipe.train.micro_batch * subject.sequence_length
