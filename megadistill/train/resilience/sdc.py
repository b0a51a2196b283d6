"""Detection of silent data corruption: digests of weights that must not change or must be equal on several ranks.

Legend: T tensors, g ranks of a group.
"""

import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megadistill.distributed.collectives import (
    Group,
    all_gather_objects,
    all_gather_rows,
    broadcast_object,
    first_false,
    group_rank,
)
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.student.engine import StudentEngine
from megadistill.types import to_device

CHUNK = 1 << 18
"""Elements multiplied at a time: 2 MiB of products, which fit a core's cache."""

REMEDY = "its device or memory is faulty: exclude the node and start again"

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
    """[T] int64: Σ bits[i] · m[i] mod 2^64 of each tensor, on its own device, with odd m.

    Any one flipped bit changes it: an odd multiple of 2^k, k < 64, is not 0. Several changes cancel with a chance of
    about 2^-32 at most, as elements have 32 bits at most. Not a cryptographic hash.
    """
    digests = [_digest(tensor) for _, tensor in tensors]
    return torch.stack(digests) if digests else torch.zeros(0, dtype=torch.int64)


def _digest(tensor: Tensor) -> Tensor:
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.dtype.itemsize])
    multipliers = _odd(CHUNK, bits.device)
    products = torch.empty_like(multipliers)
    sums = [
        torch.mul(chunk, multipliers[: len(chunk)], out=products[: len(chunk)]).sum()
        for chunk in torch.split(bits, CHUNK)
    ]
    assert len(sums) <= CHUNK
    return (torch.stack(sums) * multipliers[: len(sums)]).sum()


@lru_cache(maxsize=8)
def _odd(length: int, device: torch.device) -> Tensor:
    """[length] int64: odd numbers, by SplitMix64 (Steele, Lea and Flood, 2014); the first ones are those of any length.

    Kept on each device, since a copy for each tensor would be a wait for it.
    """
    z = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return to_device(torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)), device)


@dataclass(frozen=True)
class FrozenWeights:
    """Weights that must not change, with their digests at loading."""

    tensors: tuple[tuple[str, Tensor], ...]
    digests: Tensor
    """[T] int64."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]]) -> "FrozenWeights":
        named = tuple(tensors)
        return cls(named, weights_digest(named))

    def require_unchanged(self, topology: Topology) -> None:
        """Compares the weights with their digests. Collective over the world; a host-device sync.

        Raises:
            OperatorFault: on every rank, where a bit has changed on one.
        """
        same = (weights_digest(self.tensors) == self.digests).tolist()
        changed = [name for (name, _), equal in zip(self.tensors, same, strict=True) if not equal]
        problem = None
        if changed:
            problem = f"{describe_rank(topology)}: the teacher's {_few(changed)} changed in memory; {REMEDY}"
        raise_everywhere(problem, "the teacher's weights changed in memory", topology)

    def require_same_replicas(self, topology: Topology) -> None:
        """Compares the copies of a stage and of rows of the head in the slice group. Collective over the world.

        Raises:
            OperatorFault: on every rank, where copies differ.
        """
        difference = _difference(self.tensors, self.digests, topology.rank, topology.stage_group)
        problem = f"the teacher's weights differ: {difference}; check that its files are the same on every node"
        raise_everywhere(problem if difference else None, "the teacher's weights differ between ranks", topology)


def require_sound_student(student: StudentEngine, topology: Topology) -> None:
    """Compares the student's copies of its parameters, before a checkpoint that would hide a difference.

    Parameters that ZeRO-3 keeps whole must be the same on every rank, and each rank's shards must be its float32
    masters, rounded. Replicas must have the same masters and optimizer state, and so the same weights. For use between
    steps, after the first. Collective over the world; three host-device syncs, four with replicas.

    Raises:
        OperatorFault: on every rank, where one differs.
    """
    whole = student.state.replicated()
    difference = _difference(whole, weights_digest(whole).to(topology.device), topology.rank, topology.world_group)
    rounded_wrong = student.state.params_differing_from_master()
    unlike = _difference_of_replicas(student, topology)
    problem = None
    if rounded_wrong:
        what = f"the student's {_few(rounded_wrong)} is not its float32 master, rounded"
        problem = f"{describe_rank(topology)}: {what}; {REMEDY}"
    elif difference:
        problem = f"copies of the student's parameters differ: {difference}; {REMEDY}"
    elif unlike:
        problem = f"replicas of the student differ: {unlike}; {REMEDY}"
    raise_everywhere(problem, "the student's parameters are corrupt", topology)


def _difference_of_replicas(student: StudentEngine, topology: Topology) -> str | None:
    """The tensors that differ between the ranks with this one's shard, one of each replica. Collective over the world.

    Reads masters and optimizer state once. The weights in the model's precision are the masters, rounded.
    """
    if topology.replicas == 1:
        return None
    tensors = list(student.state.local().items())
    digests_T = weights_digest(tensors).to(topology.device)
    return _difference(tensors, digests_T, topology.rank, topology.world_group, every=topology.shard_world)


def _difference(
    tensors: Iterable[tuple[str, Tensor]], digests_T: Tensor, rank: int, group: Group | None, *, every: int = 1
) -> str | None:
    """The tensors that differ, and the ranks that hold other bits than the majority. Collective over the group.

    Gathers one digest a rank, and all T only where those differ. `every`: ranks of the group as far apart from each
    other as this hold the same tensors; each hears of its own.
    """
    whole, place = _digest(digests_T), group_rank(group) % every
    ranks_ge2 = all_gather_rows(torch.stack([whole.new_full((), rank), whole]).unsqueeze(0), group).view(-1, every, 2)
    if bool((ranks_ge2[..., 1] == ranks_ge2[0, :, 1]).all()):
        return None
    digests_gT = all_gather_rows(digests_T.unsqueeze(0), group)[place::every]
    by_rank, hosts = ranks_ge2[:, place].tolist(), all_gather_objects(socket.gethostname(), group)[place::every]
    differ = (digests_gT != digests_gT[0]).any(dim=0).tolist()
    if not any(differ):
        return None
    names = [name for (name, _), differs in zip(tensors, differ, strict=True) if differs]
    majority, holders = Counter(digest for _, digest in by_rank).most_common(1)[0]
    split = 2 * holders <= len(by_rank)
    ranks = [
        f"{holder} ({host})"
        for (holder, digest), host in zip(by_rank, hosts, strict=True)
        if split or digest != majority
    ]
    if split:
        return f"{_few(names)}, and {_ranks(ranks)} have no majority for one value"
    return f"{_few(names)}, on {_ranks(ranks)} of {len(by_rank)}"


def raise_everywhere(problem: str | None, elsewhere: str, topology: Topology) -> None:
    """Raises OperatorFault on every rank where one has a problem, so that no rank reports lost peers instead.

    A rank without one reports that of the lowest rank with one: the run's events have it from rank 0.
    """
    failing = first_false(problem is None, topology.device, topology.world_group)
    if failing is not None:
        reported = broadcast_object(problem, topology.world_group, source=failing)
        raise OperatorFault(problem or f"{elsewhere}: rank {failing} reports: {reported}")


def describe_rank(topology: Topology) -> str:
    """The rank and its host, as in `rank 3 on node07`."""
    whose = "the teacher's rank" if topology.role == "teacher" else "rank"
    return f"{whose} {topology.rank} on {socket.gethostname()}"


def _ranks(ranks: list[str]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(ranks[:8])}{' ...' * (len(ranks) > 8)}"


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
