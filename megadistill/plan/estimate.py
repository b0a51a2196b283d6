"""Memory, seconds and GPU-hours of a layout on a cluster.

Links reach the bandwidths of the accelerator's description; the slower of its two kinds of link sets the pace of a
collective, and what a call costs beyond its bytes is its latency (`plan.collective_latency`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megadistill.models.partition import stage_flops
from megadistill.plan.collective_latency import CollectiveTimes, StepLatency, collective_times
from megadistill.plan.counts.requirements import Requirements, count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.traffic import (
    ACROSS,
    ANSWERS,
    GATHERS,
    HEAD,
    NO_TRAFFIC,
    REDUCES,
    SHARED,
    STAGES,
    TEACHER_SHARED,
    VOCABULARY,
)
from megadistill.plan.latency import micro_step_latency
from megadistill.plan.layouts import Cluster, Layout
from megadistill.plan.throughput import FLOAT8_SPEEDUP, MfuAssumption, StepTimes


@dataclass(frozen=True, eq=False)
class Estimate:
    """Costs of a recipe on a cluster, at the expected MFUs."""

    sharding: Sharding
    cluster: Cluster
    requirements: Requirements
    times: StepTimes
    optimistic_times: StepTimes

    @property
    def optimistic(self) -> "Estimate":
        """The same at the optimistic MFUs."""
        return replace(self, times=self.optimistic_times)

    @property
    def layout(self) -> Layout:
        recipe, roles = self.sharding.recipe, self.sharding.roles
        return Layout(
            vocab_group=self.sharding.group_size,
            micro_batch=recipe.train.micro_batch,
            activation_checkpointing=recipe.student.activation_checkpointing,
            teacher_ranks=0 if roles is None else roles.teachers,
            stages=0 if roles is None else roles.stages,
            shard=self.sharding.shard if self.sharding.replicas > 1 else 0,
        )

    @property
    def hiding_tokens(self) -> float:
        """Tokens of the smallest micro-step whose compute hides ZeRO-3's traffic."""
        return self.sharding.tokens * (self.times.gather + self.times.reduce) / self.times.compute

    @cached_property
    def latency(self) -> StepLatency:
        """Latency of a step's collectives."""
        return StepLatency(collective_times(self.sharding, self.cluster.accelerator), self.times.without_latency)

    @cached_property
    def memory(self) -> int:
        """Bytes in use on the fullest device."""
        return max(sum(self.requirements.memory.values()), sum(self.requirements.teacher_memory.values()))

    @property
    def margin(self) -> int:
        """Free bytes of the fullest device; negative where the layout does not fit."""
        return self.cluster.accelerator.memory_bytes - self.memory

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @property
    def latency_bound(self) -> bool:
        """Whether launches and latencies take longer than the arithmetic and bytes that are counted."""
        return micro_step_latency(self.sharding) > self.times.without_latency.micro_step

    @cached_property
    def seconds(self) -> float:
        return self.times.seconds(self.sharding.steps)

    @property
    def tokens_per_second(self) -> float:
        return self.requirements.tokens / self.sharding.steps / self.times.step

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.cluster.ranks


def estimate(run: Sharding, cluster: Cluster, mfu: MfuAssumption) -> Estimate:
    """Costs of a valid layout.

    Raises:
        UserError: the peak of the GPU at the recipe's precision is not known.
    """
    requirements = count_requirements(run)
    alone = collective_times(run, cluster.accelerator)
    mfus = (mfu, optimistic_mfu(run, mfu))
    times, optimistic = (_step_times(run, requirements, alone, cluster, each) for each in mfus)
    return Estimate(run, cluster, requirements, times, optimistic)


def optimistic_mfu(run: Sharding, mfu: MfuAssumption) -> MfuAssumption:
    """The optimistic shares for the run's layers, compiled or not."""
    return mfu.optimistic(
        student_compiled=run.student_compiled.value == "compiled",
        teacher_compiled=run.teacher is not None
        and all(each.teacher_compiled.value == "compiled" for each in run.live_teachers),
    )


def _step_times(
    run: Sharding, requirements: Requirements, alone: CollectiveTimes, cluster: Cluster, mfu: MfuAssumption
) -> StepTimes:
    peak = cluster.accelerator.peak_flops(run.recipe.train.precision)
    student, *teachers = requirements.models
    student_rate, teacher_rate = (run.tokens / (share * peak) for share in (mfu.student_mfu, mfu.teacher_mfu))
    teacher_head = sum(model.work.head + model.work.recompute for model in teachers)  # computed in the loss
    forward = student.forward.forward - student.forward.head + student.work.head // 3

    def seconds(name: str) -> float:
        return run.tokens * requirements.traffic.get(name, NO_TRAFFIC).seconds(cluster.accelerator)

    traffic = run.traffic
    bandwidth = cluster.accelerator.memory_bandwidth
    if run.roles is None:
        packet = seconds(STAGES) / run.group_size
    else:
        packet = run.tokens * requirements.teacher_traffic.get(STAGES, NO_TRAFFIC).seconds(cluster.accelerator)
    times = StepTimes(
        students=run.ranks,
        micro_steps=run.accumulation,
        student_forward=student_rate * (forward + teacher_head),
        student_backward=student_rate * (student.flops - forward),
        scores_forward=run.sequences * traffic.student.forward / bandwidth,
        scores_backward=run.sequences * traffic.student.backward / bandwidth,
        recompute=run.sequences * traffic.recompute / bandwidth,
        gather=seconds(GATHERS),
        reduce=seconds(REDUCES),
        vocabulary=seconds(VOCABULARY) + seconds(HEAD),
        sequences=seconds(SHARED),
        across=seconds(ACROSS),
        stages=tuple(
            each + seconds(TEACHER_SHARED) / run.stages
            for each in _by_share(run, lambda one: _stage_seconds(one, teacher_rate, cluster))
        ),
        teacher_scores=max(_by_share(run, lambda one: _stage_scores(one, bandwidth)), default=0.0),
        packet=packet,
        answer=seconds(ANSWERS),
        replicas=0 if run.roles is None else run.roles.replicas,
        queue=1 if run.roles is None else run.teacher_section.queue,
    )
    return replace(times, collective_latency=StepLatency(alone, times).exposed)


def _float8_speedup(run: Sharding, cluster: Cluster) -> float:
    """Factor of a float8 teacher's products; 1 where the device multiplies the rounded numbers in bfloat16."""
    float8 = run.teacher_section.precision == "float8"
    has_units = cluster.accelerator.multiplies_float8 and run.recipe.train.precision == "bfloat16"
    return FLOAT8_SPEEDUP if float8 and has_units else 1.0


def _by_share(run: Sharding, seconds_of: Callable[[Sharding], Sequence[float]]) -> tuple[float, ...]:
    """Seconds of each rank's stages, one of each live teacher, for the rows of a micro-batch that each teaches."""
    of_each = ([each.stats.share * seconds for seconds in seconds_of(each)] for each in run.live_teachers)
    return tuple(map(sum, zip(*of_each, strict=True)))


def _stage_seconds(run: Sharding, rate: float, cluster: Cluster) -> tuple[float, ...]:
    """Seconds of each stage for a micro-batch. `rate`: seconds for each FLOP of a token, without float8."""
    teacher, rate = run.live_teacher, rate / _float8_speedup(run, cluster)
    products = stage_flops(teacher.layer_costs, teacher.first_layers, teacher.forward.attention, run.stages)
    scores = _stage_scores(run, cluster.accelerator.memory_bandwidth)
    return tuple(rate * each + seconds for each, seconds in zip(products, scores, strict=True))


def _stage_scores(run: Sharding, bandwidth: float) -> tuple[float, ...]:
    """Seconds of the memory traffic of each stage's attention scores for a micro-batch."""
    teacher = run.live_teacher
    a_layer = run.sequences * run.traffic.teacher / teacher.layers / bandwidth
    return tuple(a_layer * layers for layers in teacher.stage_sizes(run.stages))
