"""Every process group of a run has its time limit, those too that DeepSpeed makes without one."""

from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import distributed_c10d

from megadistill.distributed.topology import Topology
from megadistill.student.deepspeed_config import active_deepspeed_config
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import Case, build, run_steps


def _limits(topology: Topology, hpz: int) -> list[timedelta]:
    deepspeed_config, _ = active_deepspeed_config("cpu")
    deepspeed_config["zero_optimization"]["zero_hpz_partition_size"] = hpz
    student = build(Case(), topology, deepspeed_config)
    run_steps(Case(), student, topology, range(1))
    limits = []
    for group in distributed_c10d._world.pg_map:
        backend: Any = group._get_backend(topology.device)
        limits.append(backend.options._timeout)
    return limits


@pytest.mark.parametrize(("hpz", "groups"), [(1, 5), (2, 6)])
def test_every_group_has_the_time_limit_of_the_run(hpz: int, groups: int) -> None:
    """The world, the groups of vocabulary, slices and pipeline, DeepSpeed's clone of the world, and hpZ's."""
    for limits in run_ranks(4, _limits, hpz, vocab_group=2):
        assert len(limits) >= groups
        assert set(limits) == {timedelta(minutes=1)}, "of the tests' ranks; gloo's own is 30 minutes"
