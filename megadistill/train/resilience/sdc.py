"""Silent corruption: weights that must stay, or must be equal on several ranks, compared by digests. It knows no steps.

Legend: T tensors, g ranks of a group.
"""

import socket
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, everywhere
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.student.engine import StudentEngine

CHUNK = 1 << 18
"""Elements that are multiplied at a time: 2 MiB of products, which stay in a core's cache."""

WAY_OUT = "the device or the memory there is not to be trusted: leave the node out and start again"

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Gather = Callable[[Tensor], Tensor]
"""[1, ...] of every rank -> [g, ...], in rank order."""


@torch.no_grad()
def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
    """[T] int64: Σ bits[i] · m[i] mod 2^64 of each tensor, on its own device, with odd m.

    Any one flipped bit changes it: an odd multiple of 2^k, k < 64, is not 0. Several changes cancel with a chance of
    about 2^-32 at most, whichever bits they are, as elements have 32 bits at most. Tells weights apart, proves nothing.
    """
    digests = [_digest(tensor) for _, tensor in tensors]
    return torch.stack(digests) if digests else torch.zeros(0, dtype=torch.int64)


def _digest(tensor: Tensor) -> Tensor:
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.dtype.itemsize])
    multipliers = _odd(CHUNK).to(bits.device)
    products = torch.empty_like(multipliers)
    sums = [
        torch.mul(chunk, multipliers[: len(chunk)], out=products[: len(chunk)]).sum()
        for chunk in torch.split(bits, CHUNK)
    ]
    return (torch.stack(sums) * _odd(len(sums)).to(bits.device)).sum()


@lru_cache(maxsize=8)
def _odd(length: int) -> Tensor:
    """[length] int64: odd numbers, by SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64))


@dataclass(frozen=True)
class FrozenWeights:
    """Weights that nothing may change, and what their digests were when they were loaded."""

    tensors: tuple[tuple[str, Tensor], ...]
    digests: Tensor
    """[T]"""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]]) -> "FrozenWeights":
        named = tuple(tensors)
        return cls(named, weights_digest(named))

    def require_unchanged(self, topology: Topology) -> None:
        """Collective over the world (a teacher's own rank asks itself alone); a host-device sync.

        Raises:
            OperatorFault: on every rank, where a bit has changed on one.
        """
        same = (weights_digest(self.tensors) == self.digests).tolist()
        changed = [name for (name, _), held in zip(self.tensors, same, strict=True) if not held]
        problem = f"{_here(topology)}: the teacher's {_few(changed)} changed in memory; {WAY_OUT}" if changed else None
        _raise_everywhere(problem, "the teacher's weights changed in another rank's memory", topology)

    def require_same_replicas(self, topology: Topology) -> None:
        """The ranks of a slice group hold the same stage and the same rows of the head. Collective over the world.

        Raises:
            OperatorFault: on every rank, where copies differ.
        """
        gather = partial(all_gather_rows, group=topology.slice_group)
        found = _differences(self.tensors, self.digests, topology.rank, gather)
        problem = f"the teacher was not loaded alike: {found}; see that its files are the same on every node"
        _raise_everywhere(problem if found else None, "the teacher was not loaded alike on other ranks", topology)


def require_sound_student(student: StudentEngine, topology: Topology) -> None:
    """What a checkpoint would not tell, asked before it: the student's copies of one number are one number.

    Parameters that ZeRO-3 keeps whole on every rank are the same everywhere, and every rank's pieces are its float32
    masters, rounded. Between steps, after the first one. Collective over the world; a host-device sync a parameter.

    Raises:
        OperatorFault: on every rank, where one differs.
    """
    whole = student.replicated()
    gather = partial(all_gather_rows, group=topology.world_group)
    found = _differences(whole, weights_digest(whole).to(topology.device), topology.rank, gather)
    unlike = student.unlike_master()
    problem = None
    if unlike:
        problem = f"{_here(topology)}: the student's {_few(unlike)} is not its float32 master, rounded; {WAY_OUT}"
    elif found:
        problem = f"copies of the student's parameters differ: {found}; {WAY_OUT}"
    _raise_everywhere(problem, "the student's parameters are corrupt on another rank", topology)


def _differences(tensors: Iterable[tuple[str, Tensor]], digests_T: Tensor, rank: int, gather: Gather) -> str | None:
    """Which ranks hold other bits than most of them, and in which tensors. Collective over the ranks of `gather`.

    A number a rank travels; all T only where those differ.
    """
    whole = _digest(digests_T)
    told_g2 = gather(torch.stack([whole.new_tensor(rank), whole]).unsqueeze(0))
    if bool((told_g2[:, 1] == told_g2[0, 1]).all()):
        return None
    digests_gT = gather(digests_T.unsqueeze(0))
    differ = (digests_gT != digests_gT[0]).any(dim=0).tolist()
    names = [name for (name, _), differs in zip(tensors, differ, strict=True) if differs]
    told = told_g2.tolist()
    most, holders = Counter(digest for _, digest in told).most_common(1)[0]
    if 2 * holders <= len(told):
        return f"{_few(names)}, and no majority of {_ranks([holder for holder, _ in told])} says which one is wrong"
    return f"{_few(names)}, on {_ranks([holder for holder, digest in told if digest != most])} of {len(told)}"


def _raise_everywhere(problem: str | None, elsewhere: str, topology: Topology) -> None:
    """Every rank stops for the same reason: one that went on would lose its peers, and name that as its own."""
    if not everywhere(problem is None, topology.device, topology.world_group):
        raise OperatorFault(problem or f"{elsewhere}: its own line says where")


def _here(topology: Topology) -> str:
    whose = "the teacher's rank" if topology.role == "teacher" else "rank"
    return f"{whose} {topology.rank} on {socket.gethostname()}"


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
