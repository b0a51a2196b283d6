"""Floating-point operations that this rank computes, by the parts of a step whose time is measured."""

from dataclasses import dataclass

from megadistill.distributed.topology import Topology
from megadistill.models.configs.unequal_layers import first_layers
from megadistill.models.experts import RouterCoefs
from megadistill.models.families import expert_layers
from megadistill.models.flops import flops_per_token, layer_costs
from megadistill.models.partition import stage_flops
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train.setup.setup import Setup
from megadistill.train.setup.step_shape import StepShape


@dataclass(frozen=True)
class RankFlops:
    """FLOPs of one rank's matrix products, recomputation included, as `megadistill plan` counts them."""

    step: int
    """FLOPs of a step: student and loss, with both heads."""
    stage_round: int = 0
    """FLOPs of this rank's stage for one micro-batch of each rank of the pipeline; 0 where it has none, or
    stages of several teachers, whose micro-batches have other numbers of rows."""
    loss: int = 0
    """The part of `step` that is the loss: the products of both heads, and their gradients."""

    @classmethod
    def of(cls, setup: Setup, topology: Topology, shape: StepShape) -> "RankFlops":
        recipe, length = setup.recipe, shape.sequence_length
        once = flops_per_token(setup.student_config, length)
        coefs = RouterCoefs.of(recipe.loss, setup.student_config)
        counts_experts = coefs.aux > 0 and shape.accumulation > 1 and bool(expert_layers(setup.student_config))
        layers_again = (recipe.student.activation_checkpointing == "full") + counts_experts
        a_token, stage_round = 3 * once.forward + layers_again * (once.body + once.attention), 0
        # The loss computes the student's logits once for each teacher of a token.
        again = max(0.0, sum(setup.teacher_shares().values()) - 1)
        heads = round(3 * once.head * (1 + again))
        a_token += heads - 3 * once.head
        teacher_passes = 2 if recipe.loss.label_fraction > 0 else 1  # its entropy decides before the loss
        if setup.teacher_config is not None:
            teacher = flops_per_token(setup.teacher_config, length)
            a_token, heads = a_token + teacher_passes * teacher.head, heads + teacher_passes * teacher.head
            if setup.roles is None:
                costs, firsts = (tuple(each(setup.teacher_config)) for each in (layer_costs, first_layers))
                stages = stage_flops(costs, firsts, teacher.attention, topology.group_size)
                round_tokens = topology.group_size * shape.micro_batch * length // topology.sequence_ranks
                stage_round = round_tokens * stages[topology.group_rank]
        for name, share in setup.teacher_shares().items():
            config = setup.teachers[name].teacher_config
            if config is not None:
                of_teacher = int(share * teacher_passes * flops_per_token(config, length).head)
                a_token, heads = a_token + of_teacher, heads + of_teacher
        rows = shape.accumulation * shape.micro_batch  # surplus ones are computed too
        tokens = rows * length // topology.sequence_ranks
        return cls(tokens * a_token, stage_round, loss=tokens * heads)

    def by_part(self, seconds: StepSeconds) -> dict[str, tuple[int, float]]:
        """Part of a step -> its FLOPs on this rank, and the seconds that they took."""
        return {
            "student": (self.step - self.loss, seconds.student),
            "loss": (self.loss, seconds.loss),
            "teacher stage": (self.stage_round * seconds.rounds, seconds.stage),
        }

    def mfus(self, seconds: StepSeconds, peak: float | None) -> tuple[float | None, float | None]:
        """Shares of the device's peak that the products of student and loss, and those of the stage, reached.

        None where the device's peak is unknown, or this rank had nothing of it to do.
        """
        return (
            _share(self.step, seconds.student + seconds.loss, peak),
            _share(self.stage_round * seconds.rounds, seconds.stage, peak),
        )


def _share(flops: int, seconds: float, peak: float | None) -> float | None:
    return flops / seconds / peak if peak and flops and seconds > 0 else None
