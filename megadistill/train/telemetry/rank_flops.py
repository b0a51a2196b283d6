"""Floating-point operations that this rank computes, by the parts of a step whose time is measured."""

from dataclasses import dataclass

from megadistill.distributed.topology import Topology
from megadistill.models.experts import RouterCoefs
from megadistill.models.families import expert_layers
from megadistill.models.flops import flops_per_token, layer_costs
from megadistill.models.partition import stage_flops
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.train.setup.setup import Setup


@dataclass(frozen=True)
class RankFlops:
    """FLOPs of one rank's matrix products, recomputation included, as `megadistill plan` counts them."""

    step: int
    """FLOPs of a step: student and loss, with both heads."""
    stage_round: int = 0
    """FLOPs of this rank's stage for one micro-batch of each rank of the pipeline; 0 where it has none."""

    @classmethod
    def of(cls, setup: Setup, topology: Topology) -> "RankFlops":
        recipe, length = setup.recipe, setup.data.sequence_length
        once = flops_per_token(setup.student_config, length)
        coefs = RouterCoefs.of(recipe.loss, setup.student_config)
        counts_experts = coefs.aux > 0 and setup.accumulation > 1 and bool(expert_layers(setup.student_config))
        layers_again = (recipe.student.activation_checkpointing == "full") + counts_experts
        a_token, stage_round = 3 * once.forward + layers_again * (once.body + once.attention), 0
        if setup.teacher_config is not None:
            teacher = flops_per_token(setup.teacher_config, length)
            a_token += teacher.head * (2 if recipe.loss.label_fraction > 0 else 1)
            if setup.roles is None:
                costs, firsts = (tuple(each(setup.teacher_config)) for each in (layer_costs, first_layers))
                stages = stage_flops(costs, firsts, teacher.attention, topology.group_size)
                round_tokens = topology.group_size * recipe.train.micro_batch * length // topology.sequence_ranks
                stage_round = round_tokens * stages[topology.group_rank]
        return cls(setup.tokens_per_step // topology.world * a_token, stage_round)

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
