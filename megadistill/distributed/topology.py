"""The process groups of a run, and this rank's place in them: its `Topology`.

Legend: w ranks of the world, R replicas of n = w/R ranks, p ranks of a vocab group. A replica is n consecutive ranks
that share one copy of the student by ZeRO-3 (`distributed.shard`): a default world of torch's, which is DeepSpeed's,
of its own. The ranks with the same shard, one of each replica, have a group across replicas. Vocab groups are p
consecutive ranks of a replica; the frozen teacher's pipeline runs over the same ranks, on a group of its own. Slice
groups hold a replica's ranks with the same place in their vocab group: together they store the rows that each of them
computes on. The ranks that share sequences (`distributed.sequence`) have the same place in consecutive vocab groups of
a replica, so that those of a pipeline's stage do too.
"""

import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.distributed.bridge import Bridge
from megadistill.distributed.collectives import Group, RunGroup
from megadistill.distributed.flight_recorder import enable_flight_recorder
from megadistill.distributed.groups.guard import Guard
from megadistill.distributed.groups.unregistered import unregistered_group
from megadistill.distributed.launch import Launch
from megadistill.distributed.node_digests import NodeCheck, check_nodes
from megadistill.distributed.rendezvous import cannot_connect, launch_store, store_barrier
from megadistill.distributed.roles import Roles
from megadistill.distributed.vocab import VocabSlice
from megadistill.distributed.watchdog.relay import Relay, RelayClient
from megadistill.distributed.watchdog.stack_probe import collectives_joined
from megadistill.distributed.watchdog.watchdog import Watchdog
from megadistill.errors import OperatorFault, RestartFault, UserError
from megadistill.types import SequencePart

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""


@dataclass(frozen=True)
class Topology:
    """Rank, device and process groups of this process. A group of one rank is None."""

    rank: int
    world: int
    local_rank: int
    group_size: int
    """p: ranks of a vocab group, and stages of the teacher."""
    device: torch.device
    replicas: int = 1
    """R: copies of the student."""
    world_group: Group | None = None
    """All ranks of the student."""
    shard_group: ProcessGroup | None = None
    """The ranks of this replica, on each of which is a shard of the student."""
    across_group: ProcessGroup | None = None
    """The ranks with this one's shard, one of each replica."""
    guard: Guard | None = None
    """Guard of replicas that may be lost; None: a lost one ends the run."""
    vocab_group: ProcessGroup | None = None
    slice_group: ProcessGroup | None = None
    pipeline_group: ProcessGroup | None = None
    sequence_ranks: int = 1
    """Ranks that share each sequence."""
    sequence_group: ProcessGroup | None = None
    role: Literal["student", "teacher"] = "student"
    """Student and teacher have a world each where the teacher has ranks of its own."""
    role_group: Group | None = None
    """All ranks of this role, which load their models together; of the student `world_group`."""
    bridge: Bridge | None = None
    """Messages between student and teacher; None where they share their ranks."""
    timeout: timedelta | None = None
    """Time limit of a collective."""
    store: Store | None = None
    """Store in which ranks of several replicas meet; None: that of their default world."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    """Hang detection; the main thread reports each phase that it enters."""

    @property
    def shard_world(self) -> int:
        """n: ranks of a replica."""
        return self.world // self.replicas

    @property
    def shard_rank(self) -> int:
        """This rank's place in its replica, and its shard of the student."""
        return self.rank % self.shard_world

    @property
    def replica(self) -> int:
        """This rank's replica."""
        return self.rank // self.shard_world

    @property
    def stage_group(self) -> Group | None:
        """All ranks, of every replica, that hold this one's stage of the teacher and rows of its head."""
        if self.across_group is None:
            return self.slice_group
        return RunGroup(self.slice_group, self.across_group, self.device, self.guard)

    def with_replicas(
        self, replica: int, replicas: int, across: ProcessGroup | None, guard: Guard | None = None
    ) -> "Topology":
        """The topology of this rank where its replica is one of several. `across`: ranks with its shard; None: it is
        alone."""
        shard, n = self.shard_rank, self.shard_world
        whole = self.shard_group if across is None else RunGroup(self.shard_group, across, self.device, guard)
        places: dict[str, Any] = {"rank": replica * n + shard, "world": replicas * n, "replicas": replicas}
        return replace(self, **places, across_group=across, guard=guard, world_group=whole, role_group=whole)

    @property
    def group_rank(self) -> int:
        """j: this rank's place in its vocab group, and its stage of the teacher."""
        return self.rank % self.group_size

    @property
    def sequence_part(self) -> SequencePart:
        """The part of each sequence that this rank has."""
        return SequencePart(self.rank // self.group_size % self.sequence_ranks, self.sequence_ranks)

    @property
    def data_rank(self) -> int:
        """This rank's place among the `data_world` that read different sequences."""
        return self.rank // (self.group_size * self.sequence_ranks) * self.group_size + self.group_rank

    @property
    def data_world(self) -> int:
        return self.world // self.sequence_ranks

    def limit_all_groups(self) -> None:
        """Gives every group of this process the time limit, those too that others have made, as DeepSpeed does.

        A group that is made without one has its backend's, 10 minutes under NCCL, whatever the world's is.
        """
        if self.timeout is None:
            return
        for group in distributed_c10d._world.pg_map:
            for device in group._device_types:  # a group of the host's alone has no backend for this device
                backend: Any = group._get_backend(device)
                backend._set_default_timeout(self.timeout)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's logs, tables and manifests."""
        return self.rank == 0 and self.role == "student"


def even_slice(vocab_size: int, topology: Topology) -> VocabSlice:
    """This rank's rows of a vocabulary that no student's partition has split."""
    place, ranks = topology.group_rank, topology.group_size
    start, stop = (vocab_size * edge // ranks for edge in (place, place + 1))
    return VocabSlice.contiguous(start, stop, vocab_size, topology.vocab_group)


def local_device(local_rank: int) -> torch.device:
    """This process's accelerator (local rank modulo the visible devices), or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    index = local_rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


@contextmanager
def process_groups(
    launch: Launch,
    *,
    vocab_group: int,
    timeout_minutes: float,
    sequence: int = 1,
    replicas: int = 1,
    roles: Roles | None = None,
    node_check: NodeCheck | None = None,
) -> Iterator[Topology]:
    """The process groups of a run, from `init_process_group` to `destroy_process_group`.

    Works with torch's default backend for the device (nccl on NVIDIA GPUs, gloo on a CPU). A process that no launcher
    started becomes a world of one. After an error the groups are left to the process's end: taking them down would wait
    for peers that may be waiting themselves. With `roles`, student and teacher are a world each, joined by a bridge.
    So is each of the student's `replicas`, which divide its ranks; groups of their own join them.
    The topology's watchdog is started; no phase has a time limit before the caller enters one.

    `node_check` runs on the first rank of each node, before any group is made: see `node_check.check_nodes`.

    Raises:
        UserError, RestartFault, OperatorFault: the ranks did not find each other (see `rendezvous`).
        RestartFault: a collective failed, mostly because a peer died; the message names it where it is known.
    """
    device = local_device(launch.local_rank)
    # DeepSpeed reads these too, and looks for MPI where they are missing.
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # a free port
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world), LOCAL_RANK=str(launch.local_rank))
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # torchrun sets it; under the deepspeed launcher each rank would take all cores, and all of them wait.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world))
    own = launch if roles is None else _own_launch(launch, roles)
    role = "student" if roles is None or roles.is_student(launch.rank) else "teacher"
    enable_flight_recorder(timeout)
    store = launch_store(launch, timeout)
    watchdog, topology = Watchdog(), None
    try:
        watchdog = _start_watchdog(launch, store, timeout)
        if node_check is not None:
            _check_files(node_check, store, launch, timeout)
        n = own.world // replicas if role == "student" else own.world
        replica, place = divmod(own.rank, n)
        world = role if n == own.world else f"{role}_{replica}"  # torch's default one
        os.environ.update(RANK=str(place), WORLD_SIZE=str(n))  # DeepSpeed reads them
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, store=PrefixStore(world, store), rank=place, world_size=n, timeout=timeout)
        if roles is None or role == "student":
            groups = {"vocab_group": vocab_group, "sequence": sequence, "replicas": replicas}
            topology = topology_of_world(own, **groups, store=store, device=device, timeout=timeout)
        else:
            topology = topology_of_teacher(own, roles, device=device, timeout=timeout)
        bridge = None if roles is None else Bridge(store, roles, launch.rank, device=device, timeout=timeout)
        watchdog.collectives = partial(
            collectives_joined, world, topology.across_group, excluded=topology.pipeline_group
        )
        yield replace(topology, bridge=bridge, watchdog=watchdog)
        # A rank that left now would be reported lost by those that still work.
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        store_barrier(store, "end", launch.rank, launch.world, timeout)
        if bridge is not None:
            bridge.close()
        if topology.across_group is not None:
            topology.across_group.shutdown()
    except BaseException as error:
        if topology is None and (reason := cannot_connect(error)) is not None:
            watchdog.report_failure(reason)
            raise OperatorFault(reason) from error
        if _is_communication(error):
            raise _lost_peer(watchdog, error) from error
        watchdog.report_failure(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    watchdog.stop()
    dist.destroy_process_group()


def _check_files(node_check: NodeCheck, store: Store, launch: Launch, timeout: timedelta) -> None:
    digests: Mapping[str, str] = {}
    problem: UserError | RestartFault | None = None
    if launch.local_rank == 0:
        try:
            digests = node_check()
        except (UserError, RestartFault) as error:
            problem = error
    check_nodes(store, launch, digests, problem, timeout)


def _start_watchdog(launch: Launch, store: Store, timeout: timedelta) -> Watchdog:
    return Watchdog(
        store if launch.world > 1 else None,
        rank=launch.rank,
        world=launch.world,
        silence=min(60.0, timeout.total_seconds() / 2),  # before a collective times out, which names no rank
        collective_limit=timeout.total_seconds(),
        reports_rank_0=launch.rank == 1 or launch.local_rank == 0,
        relay=_node_relay(launch, store),
    ).start()


def _node_relay(launch: Launch, store: Store) -> Relay | RelayClient | None:
    """This rank's end of its node's connection to the watchdog's store; None for a node of one rank.

    Launchers give a node consecutive ranks. Where one does not, or a sandbox has no such sockets, ranks find none of
    this name, and each has a connection of its own.
    """
    if launch.rank == 0 and launch.world > 1:
        store.set("watchdog_relay", secrets.token_hex(16))
    first = launch.rank - launch.local_rank
    if launch.local_world == 1 or first < 0:  # rank 0 does not pass its heartbeat on: it reads those of all
        return None
    name = f"megadistill-{store.get('watchdog_relay').decode()}-{first}"
    if launch.local_rank == 0:
        with suppress(OSError):
            return Relay(name, range(first + 1, first + launch.local_world))
        return None
    return RelayClient(name, launch.rank)


def _lost_peer(watchdog: Watchdog, error: BaseException) -> RestartFault:
    with suppress(ValueError):  # another thread than the main one
        # A launcher ends the peers of a dead rank at once, and this one needs seconds to learn which it was.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lost = watchdog.lost_rank() or "see the log of the rank that failed first"
    reason = f"lost another rank in a collective: {lost} ({str(error).splitlines()[0]})"
    fault = RestartFault(reason)
    if watchdog.on_abort is not None:
        fault.prints = watchdog.on_abort(reason) is not False
    return fault


def _own_launch(launch: Launch, roles: Roles) -> Launch:
    """This rank's place in the world of its role."""
    if roles.is_student(launch.rank):
        return replace(launch, world=roles.students)
    return replace(launch, rank=launch.rank - roles.students, world=roles.teachers)


def _is_communication(error: BaseException) -> bool:
    """gloo reports a lost peer as a plain RuntimeError that names its own source."""
    from_gloo = isinstance(error, RuntimeError) and any(
        source in str(error) for source in ("gloo/transport", "Connection closed")
    )
    return from_gloo or isinstance(error, dist.DistError)


def topology_of_world(
    launch: Launch,
    *,
    vocab_group: int,
    device: torch.device,
    timeout: timedelta,
    sequence: int = 1,
    replicas: int = 1,
    store: Store | None = None,
) -> Topology:
    """The groups of an initialised world, each with `timeout`: a group does not inherit the world's. Collective.

    `launch`: of all `replicas`, each of which is a world. They meet in `store`, which one replica does not need.
    `sequence`: ranks that share each sequence. Times `vocab_group` it divides a replica.
    """
    n, p = launch.world // replicas, vocab_group
    consecutive = [list(range(first, first + p)) for first in range(0, n, p)]
    strided = [list(range(place, n, p)) for place in range(p)]
    sharing = [
        list(range(first + place, first + p * sequence, p)) for first in range(0, n, p * sequence) for place in range(p)
    ]
    world_group = dist.group.WORLD if n > 1 else None
    replica, shard = divmod(launch.rank, n)
    alone = Topology(
        rank=shard,
        world=n,
        local_rank=launch.local_rank,
        group_size=p,
        device=device,
        world_group=world_group,
        shard_group=world_group,
        role_group=world_group,
        vocab_group=_own_group(consecutive, timeout),
        slice_group=_own_group(strided, timeout),
        pipeline_group=_own_group(consecutive, timeout),
        sequence_ranks=sequence,
        sequence_group=_own_group(sharing, timeout),
        timeout=timeout,
    )
    if replicas == 1:
        return alone
    assert store is not None, "replicas have no store to meet in"
    where: dict[str, Any] = {"device": device, "name": f"across_{shard}"}
    across = unregistered_group(store, replica, range(shard, launch.world, n), timeout, **where)
    return replace(alone.with_replicas(replica, replicas, across), store=store)


def topology_of_teacher(own: Launch, roles: Roles, *, device: torch.device, timeout: timedelta) -> Topology:
    """The groups of the teacher's own ranks, for loading alone: they exchange messages over the bridge. Collective.

    A slice group holds the ranks with the same stage, one of each replica.
    """
    strided = [list(range(stage, own.world, roles.stages)) for stage in range(roles.stages)]
    return Topology(
        rank=own.rank,
        world=own.world,
        local_rank=own.local_rank,
        group_size=roles.stages,
        device=device,
        slice_group=_own_group(strided, timeout),
        role="teacher",
        role_group=dist.group.WORLD if own.world > 1 else None,
        timeout=timeout,
    )


def _own_group(partition: list[list[int]], timeout: timedelta) -> ProcessGroup | None:
    """This rank's group in a partition of the world into groups of one size."""
    if len(partition[0]) == 1:
        return None
    new_groups: Callable[..., tuple[ProcessGroup, list[ProcessGroup]]] = dist.new_subgroups_by_enumeration
    return new_groups(partition, timeout=timeout)[0]
