"""Files that one rank of a group reads: the others receive the tensors by broadcast.

Read once for all replicas, a model costs a shared file system its size at a start, however many replicas there are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Size, Tensor

from megadistill.distributed.collectives import (
    Group,
    broadcast_from_first,
    broadcast_object,
    first_false,
    group_rank,
    group_size,
)
from megadistill.distributed.topology import Topology
from megadistill.errors import RankUserError, RestartFault, UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Layout:
    """Shape and type of a tensor."""

    shape: Size
    dtype: torch.dtype


def read_by_first(topology: Topology, read: Callable[[], Value]) -> Value:
    """The result of `read`, which the first rank of this role alone calls, on every rank. Collective.

    Raises:
        RankUserError: on every rank, with the UserError of `read`.
    """
    outcome: tuple[Value | None, str | None] = None, None
    if topology.rank == 0:
        try:
            outcome = read(), None
        except UserError as error:
            outcome = None, f"rank 0: {error}"
    value, problem = broadcast_object(outcome, topology.role_group)
    if problem is not None:
        raise _shared(RankUserError(problem), prints=topology.rank == 0)
    return cast(Value, value)


def _shared(error: RankUserError | RestartFault, *, prints: bool) -> RankUserError | RestartFault:
    """The error of all ranks, which one of them prints."""
    error.prints = prints
    return error


class BroadcastReader:
    """One loading of tensors, which the first rank of `group` reads and the others receive, one after the other.

    Collective: all ranks of the group pass the same layouts in the same order, and all ranks of the topology's role
    call `finish`. A rank that cannot read goes on with broadcasts of memory without content, so that the order of
    collectives is the same whether it fails or not, and no rank waits for it: `finish` raises its error on every rank.

    Each tensor has the time limit of a collective: a large stage on slow storage is no hang.

    Without a group every rank reads for itself; without a topology too, and an error is raised where it occurs.
    """

    def __init__(self, topology: Topology | None = None, *, group: Group | None = None) -> None:
        self._topology, self._group = topology, group
        self._role_group = None if topology is None else topology.role_group
        self._error: UserError | RestartFault | None = None
        self._began = time.monotonic()

    @property
    def reads(self) -> bool:
        """Whether this rank reads."""
        return group_rank(self._group) == 0

    @property
    def receivers(self) -> int:
        """Ranks that receive what this one, or another one, reads."""
        return group_size(self._group) - 1

    @property
    def seconds(self) -> float:
        """Time (s) since the loading began."""
        return time.monotonic() - self._began

    def tensors(
        self, layouts: Sequence[Layout], read: Callable[[], Sequence[Tensor]], *, device: torch.device
    ) -> list[Tensor]:
        """Contiguous tensors of these layouts on the device, which `read` returns where this rank reads them.

        Raises:
            UserError, RestartFault: of `read`, where no other rank loads with this one.
        """
        self._enter_phase("loading the teacher")
        loaded: list[Tensor] = []
        if self.reads and self._error is None:
            try:
                loaded = list(read())
                held = [Layout(tensor.shape, tensor.dtype) for tensor in loaded]
                assert held == list(layouts), f"read {held}, the other ranks expect {layouts}"
            except (UserError, RestartFault) as error:
                if self._role_group is None:
                    raise
                self._error = error
        if not loaded:
            loaded = [torch.empty(layout.shape, dtype=layout.dtype, device=device) for layout in layouts]
        for tensor in loaded:
            broadcast_from_first(tensor, self._group)
        return loaded

    def finish(self) -> None:
        """Ends the loading; collective over the ranks of this role. One host-device sync.

        Raises:
            UserError, RestartFault: on every rank, where one could not read; the message names it.
        """
        self._enter_phase("starting")
        if self._topology is None or self._role_group is None:
            return
        failing = first_false(self._error is None, self._topology.device, self._role_group)
        if failing is None:
            return
        own = None
        if self._error is not None:
            whose = "the teacher's rank" if self._topology.role == "teacher" else "rank"
            own = (f"{whose} {self._topology.rank}: {self._error}", isinstance(self._error, UserError))
        reason = broadcast_object(own, self._role_group, source=failing)
        assert reason is not None, "it is that of the failing rank"
        message, is_input = reason
        error = RankUserError(message) if is_input else RestartFault(message)
        raise _shared(error, prints=group_rank(self._role_group) == failing)

    def _enter_phase(self, phase: str) -> None:
        """A rank of the teacher's own is without a limit when it has loaded: it waits for requests."""
        if self._topology is None or self._topology.timeout is None:
            return
        limit = self._topology.timeout.total_seconds()
        ends = phase == "starting" and self._topology.role == "teacher"
        self._topology.watchdog.enter_phase(phase, 0, limit=None if ends else limit)
