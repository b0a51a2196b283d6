"""Rank arithmetic and process groups: from a launcher's environment to a `Topology`.

Legend: w ranks of the world, p ranks of a vocab group. Vocab groups are p consecutive ranks; the frozen teacher's
pipeline runs over the same ranks, on a group of its own. Slice groups hold the ranks with the same place in their
vocab group: together they store the rows that each of them computes on.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megadistill.distributed.bridge import Bridge
from megadistill.distributed.collectives import barrier
from megadistill.distributed.roles import Roles
from megadistill.distributed.watchdog.stack_probe import collectives_joined
from megadistill.distributed.watchdog.watchdog import Watch
from megadistill.errors import RestartFault, UserError

WAITS_FOR_RANKS = True
"""The hang detector takes a frame of this module for a wait."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says: torchrun and deepspeed set the same variables, srun its own, plain python none."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls) -> "Launch":
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (deepspeed: LOCAL_SIZE), else those of a Slurm step.

        Raises:
            UserError: some of them are set and others are not, or they are no numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        present = [name for name in names if name in os.environ]
        if not present:
            return cls._of_slurm_step() if _in_slurm_step() else cls(rank=0, world=1, local_rank=0, local_world=1)
        missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"the environment sets {', '.join(present)} but not {', '.join(missing)}: start this with torchrun or "
                "deepspeed, or unset them for a single process"
            )
        try:
            world = int(os.environ["WORLD_SIZE"])
            launch = cls(
                rank=int(os.environ["RANK"]),
                world=world,
                local_rank=int(os.environ["LOCAL_RANK"]),
                local_world=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(world)))),
            )
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from None
        if launch.local_world < 1:
            raise UserError(f"LOCAL_WORLD_SIZE is {launch.local_world}: a node has at least one process")
        if not 0 <= launch.rank < world:
            raise UserError(f"RANK is {launch.rank} and WORLD_SIZE is {world}: ranks count from 0 to {world - 1}")
        return launch

    @classmethod
    def _of_slurm_step(cls) -> "Launch":
        """srun's variables. In a heterogeneous job they count over all components of the step."""
        try:
            rank, world, local_rank, node = (
                int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")
            )
            local_world = _per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])[node]
            launch = cls(rank=rank, world=world, local_rank=local_rank, local_world=local_world)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"this is a step of a Slurm job, but its variables do not say which rank this is ({error!r}): start it "
                "with srun --nodes --ntasks --ntasks-per-node, or set RANK, WORLD_SIZE and LOCAL_RANK"
            ) from None
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if world > 1 and missing:
            raise UserError(
                f"srun started {world} tasks, and the environment does not set {' and '.join(missing)}: export the "
                "first node's name and a free port before srun, as slurm/train.sbatch does"
            )
        return launch


_FIRST_STEP_THAT_IS_NONE = 0xFFFFFFF0
"""Slurm numbers what is no parallel step from here on: batch scripts, `salloc`'s shell, what came with `--x11`."""


def _in_slurm_step() -> bool:
    """Whether srun started this process. A batch script's or an allocation's shell has tasks in its variables too."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) < _FIRST_STEP_THAT_IS_NONE:
        return True
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1":
        print(
            f"megadistill: one process in a Slurm allocation of {tasks} tasks: srun starts one a task, as "
            "slurm/train.sbatch shows",
            file=sys.stderr,
        )
    return False


def _per_node(tasks: str) -> list[int]:
    """Of Slurm's `2(x3),1`: 2, 2, 2, 1."""
    counts = []
    for run in tasks.split(","):
        count, _, repeated = run.partition("(x")
        counts += [int(count)] * int(repeated.rstrip(")") or "1")
    return counts


@dataclass(frozen=True)
class Topology:
    """Who this process is and whom it talks to. A group of one rank is None."""

    rank: int
    world: int
    local_rank: int
    group_size: int
    """p: ranks of a vocab group, and stages of the teacher."""
    device: torch.device
    world_group: ProcessGroup | None
    vocab_group: ProcessGroup | None
    slice_group: ProcessGroup | None
    pipeline_group: ProcessGroup | None
    role: Literal["student", "teacher"] = "student"
    """The teacher's ranks have a world of their own, where the teacher is not colocated."""
    bridge: Bridge | None = None
    """To the other role; None where there is none."""
    watch: Watch = field(default_factory=Watch)
    """To be told what this rank begins: it finds who holds up the launch."""

    @property
    def group_rank(self) -> int:
        """j: this rank's place in its vocab group, and its stage of the teacher."""
        return self.rank % self.group_size

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run (logs, tables, manifests)."""
        return self.rank == 0 and self.role == "student"


def vocab_group_size(asked: int | None, launch: Launch) -> int:
    """p: what the recipe asks for, else the ranks of a node (they share the fastest links).

    Raises:
        UserError: it does not divide the world.
    """
    size = launch.local_world if asked is None else asked
    if launch.world % size:
        divisors = [d for d in range(1, launch.world + 1) if launch.world % d == 0]
        raise UserError(
            f"comm.vocab_group is {size}, but this run has {launch.world} "
            f"{'process' if launch.world == 1 else 'processes'}: it must divide them, so one of "
            f"{', '.join(map(str, divisors))} (start with more processes, or --set comm.vocab_group={divisors[-1]})"
        )
    return size


def local_device(local_rank: int) -> torch.device:
    """This process's accelerator (local rank modulo the visible devices), or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    index = local_rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


@contextmanager
def joined(
    launch: Launch, *, vocab_group: int, timeout_minutes: float, roles: Roles | None = None
) -> Iterator[Topology]:
    """The process groups of a run, from `init_process_group` to `destroy_process_group`.

    Works with torch's default backend for the device (nccl on NVIDIA GPUs, gloo on a CPU). A process that no launcher
    started becomes a world of one. After an error the groups are left to the process's end: taking them down would wait
    for peers that may be waiting themselves. With `roles`, student and teacher are a world each, joined by a bridge.
    The topology's watch is at work; no phase has a limit before the caller stamps one.

    Raises:
        RestartFault: a collective failed, which mostly is a peer that died first; its own reason is in its own lines.
    """
    device = local_device(launch.local_rank)
    # DeepSpeed reads these too, and looks for MPI where they are missing.
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world), LOCAL_RANK=str(launch.local_rank))
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # torchrun sets it; under the deepspeed launcher each rank would take all cores, and all of them wait.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world))
    own = launch if roles is None else _own_launch(launch, roles)
    role = "student" if roles is None or roles.is_student(launch.rank) else "teacher"
    watch = Watch()
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        watch = _started_watch(launch, role, store, timeout)
        os.environ.update(RANK=str(own.rank), WORLD_SIZE=str(own.world))  # DeepSpeed reads them
        backend = dist.get_default_backend_for_device(device)
        of_role = PrefixStore(role, store)
        dist.init_process_group(backend, store=of_role, rank=own.rank, world_size=own.world, timeout=timeout)
        if roles is None or role == "student":
            topology = topology_of_world(own, vocab_group=vocab_group, device=device, timeout=timeout)
        else:
            topology = _teachers_topology(own, roles, device)
        bridge = None if roles is None else Bridge(store, roles, launch.rank, device=device, timeout=timeout)
        watch.count(lambda: collectives_joined(role, but=topology.pipeline_group))
        yield replace(topology, bridge=bridge, watch=watch)
        # Nobody leaves while another may still look for it.
        if bridge is not None:
            bridge.barrier()
        else:
            barrier(topology.world_group)
    except RuntimeError as error:
        if not _is_communication(error):
            watch.failed(_one_line(error))
            raise
        raise RestartFault(_lost(watch, error)) from error
    except BaseException as error:
        watch.failed(_one_line(error))
        raise
    watch.stop()
    dist.destroy_process_group()


def _started_watch(launch: Launch, role: str, store: Store, timeout: timedelta) -> Watch:
    return Watch(
        store if launch.world > 1 else None,
        rank=launch.rank,
        world=launch.world,
        silence=min(60.0, timeout.total_seconds() / 2),  # sooner than a collective gives up, which names nobody
        speaks=launch.rank == 1 or launch.local_rank == 0,
    ).start()


def _lost(watch: Watch, error: RuntimeError) -> str:
    missing = watch.lost() or "look for its own reason first"
    reason = f"lost another rank in a collective: {missing} ({str(error).splitlines()[0]})"
    if watch.on_verdict is not None:
        watch.on_verdict(reason)
    return reason


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _own_launch(launch: Launch, roles: Roles) -> Launch:
    """The launch as this rank's role sees it."""
    if roles.is_student(launch.rank):
        return replace(launch, world=roles.students)
    return replace(launch, rank=launch.rank - roles.students, world=roles.teachers)


def _teachers_topology(launch: Launch, roles: Roles, device: torch.device) -> Topology:
    """Of a teacher's rank: its stages talk over the bridge, so it has no groups."""
    return Topology(
        rank=launch.rank,
        world=launch.world,
        local_rank=launch.local_rank,
        group_size=roles.stages,
        device=device,
        world_group=None,
        vocab_group=None,
        slice_group=None,
        pipeline_group=None,
        role="teacher",
    )


def _is_communication(error: RuntimeError) -> bool:
    """gloo reports a lost peer as a plain RuntimeError that names its own source."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "Connection closed" in str(error)


def topology_of_world(launch: Launch, *, vocab_group: int, device: torch.device, timeout: timedelta) -> Topology:
    """The groups of an initialised world, each with `timeout`: a group does not inherit the world's. Collective."""
    world, p = launch.world, vocab_group
    consecutive = [list(range(first, first + p)) for first in range(0, world, p)]
    strided = [list(range(place, world, p)) for place in range(p)]
    return Topology(
        rank=launch.rank,
        world=world,
        local_rank=launch.local_rank,
        group_size=p,
        device=device,
        world_group=dist.group.WORLD if world > 1 else None,
        vocab_group=_own_group(consecutive, launch.rank, timeout),
        slice_group=_own_group(strided, launch.rank, timeout),
        pipeline_group=_own_group(consecutive, launch.rank, timeout),
    )


def _own_group(partition: list[list[int]], rank: int, timeout: timedelta) -> ProcessGroup | None:
    own = None
    for ranks in partition:
        if len(ranks) == 1:
            continue
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = group
    return own
