"""Measurement of the latency of small collectives, over the world and over the groups that a run uses."""

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megadistill.distributed.collectives import all_gather_rows, all_reduce_sum, barrier, group_size
from megadistill.distributed.topology import Topology

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

SAMPLES = 9
"""Repetitions of a measurement, of which the median counts, after those that open the connections."""
FIRST_SAMPLES = 2
NUMBERS = 2
"""Float32 of a rank in a message: its latency alone is measured."""

Latencies = dict[str, dict[int, float]]
"""`all_gather` or `all_reduce` -> ranks of the group -> seconds, the slowest group's."""


def collective_latencies(topology: Topology, group_ranks: int) -> Latencies:
    """Seconds of a small collective over the world, and over groups of `group_ranks` consecutive ranks.

    The groups are measured at the same time, as a run uses them. Collective over the world; the same on every rank.
    Empty in a world of one.
    """
    latencies: Latencies = {"all_gather": {}, "all_reduce": {}}
    if topology.world_group is None:
        return {}
    groups = [topology.world_group]
    if 1 < group_ranks < topology.world and topology.world % group_ranks == 0:
        groups.append(_consecutive(topology, group_ranks))
    row = torch.zeros(1, NUMBERS, device=topology.device)
    for group in groups:
        for name, collective in (("all_gather", all_gather_rows), ("all_reduce", all_reduce_sum)):
            latencies[name][group_size(group)] = _median_seconds(partial(collective, row, group), topology)
    return latencies


def _consecutive(topology: Topology, ranks: int) -> ProcessGroup:
    partition = [list(range(first, first + ranks)) for first in range(0, topology.world, ranks)]
    timeout = topology.timeout or timedelta(minutes=10)
    new_groups: Callable[..., tuple[ProcessGroup, list[ProcessGroup]]] = dist.new_subgroups_by_enumeration
    return new_groups(partition, timeout=timeout)[0]


def _median_seconds(work: Callable[[], object], topology: Topology) -> float:
    """The median of this rank's times of `work`; of all ranks, the largest."""
    seconds = []
    for _ in range(FIRST_SAMPLES + SAMPLES):
        barrier(topology.world_group)
        began = time.perf_counter()
        work()
        if topology.device.type != "cpu":
            torch.accelerator.synchronize(topology.device)
        seconds.append(time.perf_counter() - began)
    own = torch.tensor([[statistics.median(seconds[FIRST_SAMPLES:])]], dtype=torch.float64, device=topology.device)
    return float(all_gather_rows(own, topology.world_group).max())
