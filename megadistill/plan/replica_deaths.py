"""Cost of faults that end one replica of the student, where the others go on.

The survivors notice it, make their groups anew and take the step again without it, then wait once more when a
replacement joins at the end of a step. Until then the run has the throughput of R - 1 replicas. So a death costs

    pause + replacement / R   seconds,   pause = notice + groups + a step + groups + the state from a living replica

and nothing of the steps since the last save. By the renewal reward theorem, with a mean time M between faults of which
a share f are such deaths, useful time over wall time is 1 / (1 + f/M · (pause + replacement / R)); it multiplies Daly's
goodput of the restarts, whose mean time between faults is M / (1 - f). Faults are rare against a replacement's time, so
two deaths at once are left out, and with them `distributed.min_replicas`. Replicas survive where they are launches of
their own; `fixed_ranks` names what does not go with that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megadistill.config.recipe import Recipe
from megadistill.plan.estimate import Estimate
from megadistill.plan.restart import CHECKPOINT, CLEANUP, FAULT, GROUPS, GROUPS_OF_RANK
from megadistill.student.optimizer import state_bytes

NOTICE = 10.0
"""Time (s) after which the others notice a host that is silent; a process that was killed takes less than one."""
ONE_NODE = 321 / 419
"""Share of the faults that are one node's: of Llama 3 405B's 419 (arXiv:2407.21783, table 5) without 54 bugs of
software, 7 time-outs of NCCL and 2 of dependencies, which every replica has, and 35 of network switches and cables,
which several may have."""


@dataclass(frozen=True)
class Deaths:
    """Faults that end one replica alone."""

    share: float = 0.0
    """Fraction of all faults; 0: each fault ends the run."""
    pause: float = 0.0
    """Time (s) for which all wait, at the death and when the replacement joins."""
    replacement: float = 0.0
    """Time (s) until the replacement has joined. A spare node is at hand."""
    replicas: int = 1

    @property
    def cost(self) -> float:
        """Time (s) of the whole run that a death costs."""
        return self.pause + self.replacement / self.replicas

    def goodput(self, between_faults: float) -> float:
        """Useful time over wall time, if nothing else happened. `between_faults`: mean time (s)."""
        return 1.0 / (1.0 + self.share * self.cost / between_faults)


NO_DEATHS = Deaths()
"""Value for a run that each fault ends."""


def count_deaths(estimate: Estimate, restart: Mapping[str, float]) -> Deaths:
    """Deaths of replicas of a layout. `restart`: parts of a restart (`restart_parts`)."""
    run = estimate.sharding
    if run.replicas == 1 or fixed_ranks(run.recipe) is not None:
        return NO_DEATHS
    groups = GROUPS + GROUPS_OF_RANK * run.replicas
    state = state_bytes(run.recipe.train.optimizer) * run.partition_size
    joining = groups + state / estimate.cluster.accelerator.network_bandwidth
    pause = NOTICE + groups + estimate.times.step + joining
    of_others = GROUPS_OF_RANK * (estimate.cluster.ranks - run.shard)  # a replacement makes its own groups alone
    replacement = sum(restart.values()) - restart[FAULT] - restart[CHECKPOINT] + CLEANUP - of_others
    return Deaths(ONE_NODE, pause, replacement, run.replicas)


def fixed_ranks(recipe: Recipe) -> str | None:
    """The setting that ties a run to its ranks, so that replicas cannot be launches that come and go; None: none does.

    A run refuses the same (`train.setup.ranks_and_files`).
    """
    teacher = recipe.teacher
    if teacher is not None and teacher.placement == "disaggregated":
        return "teacher.placement=disaggregated"
    if teacher is not None and teacher.save_targets is not None:
        return "teacher.save_targets"
    return None if recipe.checkpoint.local is None else "checkpoint.local"
