"""The place of this process in its launch, read from the environment that torchrun, deepspeed or srun sets."""

import logging
import math
import os
import resource
from dataclasses import dataclass, replace

from megadistill.errors import UserError
from megadistill.redaction import printable
from megadistill.units import number_of

logger = logging.getLogger(__name__)

_FIRST_RESERVED_STEP = 0xFFFFFFF0
"""Slurm numbers batch scripts, `salloc`'s shell and other steps that srun did not start from here on."""


def raise_open_files() -> int:
    """Raises this process's limit on open files, which connections count to, to its hard limit; returns that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def environment_rank() -> int:
    """The global rank of this process: RANK, or SLURM_PROCID in a step of srun; 0 where neither is set."""
    return _number("RANK", "SLURM_PROCID")


def environment_local_rank() -> int:
    """The rank of this process on its node: LOCAL_RANK, or SLURM_LOCALID in a step of srun; 0 where neither is set."""
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def environment_replica() -> str | None:
    """The number of this process's replica, where that is a launch of its own: MEGADISTILL_REPLICA."""
    number = os.environ.get("MEGADISTILL_REPLICA")
    return None if number is None else printable(number)[:10]


def _number(launcher: str, slurm: str) -> int:
    value = os.environ.get(launcher) or (os.environ.get(slurm) if "SLURM_STEP_ID" in os.environ else None) or "0"
    return int(value) if value.isdigit() else 0


@dataclass(frozen=True)
class SeparateReplica:
    """Place of a replica of the student that is a launch of its own, and the store in which replicas meet."""

    replica: int
    replicas: int
    """Those that are launched at first."""
    host: str
    port: int

    @property
    def store(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def from_environment(cls) -> "SeparateReplica | None":
        """Reads MEGADISTILL_REPLICA, MEGADISTILL_REPLICAS and MEGADISTILL_STORE; None where none of them is set.

        Raises:
            UserError: some of them are missing, or no such values.
        """
        names = ("MEGADISTILL_REPLICA", "MEGADISTILL_REPLICAS", "MEGADISTILL_STORE")
        given = {name: os.environ[name] for name in names if name in os.environ}
        if not given:
            return None
        if missing := [name for name in names if name not in given]:
            raise UserError(
                f"the environment sets {', '.join(given)} but not {', '.join(missing)}: a replica that is a launch of "
                "its own has its number, how many there are, and HOST:PORT of the store where they meet"
            )
        number, count, store = given.values()
        host, _, port = store.rpartition(":")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise UserError(
                f"MEGADISTILL_REPLICA is {printable(number)[:40] or 'empty'} and MEGADISTILL_REPLICAS "
                f"{printable(count)[:40] or 'empty'}: "
                "replicas count from 0 to one less than their number"
            )
        if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise UserError(f"MEGADISTILL_STORE is {printable(store)[:80]}: give HOST:PORT")
        return cls(int(number), int(count), host.removeprefix("[").removesuffix("]"), int(port))


@dataclass(frozen=True)
class Launch:
    """Ranks and sizes of this process's launch: torchrun and deepspeed set them, srun its own, plain python none."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    separate: SeparateReplica | None = None
    """Number of a replica that is a launch of its own; None: all replicas are one launch."""

    @property
    def replicas(self) -> int:
        """Launches of the run."""
        return 1 if self.separate is None else self.separate.replicas

    def of_all_replicas(self) -> "Launch":
        """This process's place among the ranks of all replicas, those that are launches of their own too."""
        if self.separate is None:
            return self
        first = self.separate.replica * self.world
        return replace(self, rank=first + self.rank, world=self.separate.replicas * self.world)

    @property
    def open_files(self) -> int:
        """Files and connections that rank 0's process needs open, if it has the store of the launch.

        Each rank has a connection to the store, as has the watchdog of each node. The rest is for the ranks' own
        meeting in a process group, where rank 0 may hear from all at a time, for files, libraries and devices.
        """
        nodes = -(-self.world // self.local_world)
        return 2 * self.world + nodes + 512

    @classmethod
    def from_environment(cls) -> "Launch":
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (deepspeed: LOCAL_SIZE), else those of a Slurm step.

        Raises:
            UserError: some of them are set and others are not, or they are no numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        present = [name for name in names if name in os.environ]
        if not present:
            separate = SeparateReplica.from_environment()
            if _in_slurm_step():
                return replace(cls._from_slurm_step(), separate=separate)
            return cls(rank=0, world=1, local_rank=0, local_world=1, separate=separate)
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
                separate=SeparateReplica.from_environment(),
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from None
        if launch.local_world < 1:
            raise UserError(f"LOCAL_WORLD_SIZE is {launch.local_world}: a node has at least one process")
        if not 0 <= launch.rank < world:
            raise UserError(f"RANK is {launch.rank} and WORLD_SIZE is {world}: ranks count from 0 to {world - 1}")
        return launch

    @classmethod
    def _from_slurm_step(cls) -> "Launch":
        """Reads srun's variables. In a heterogeneous job they count over all components of the step."""
        try:
            rank, world, local_rank, node = (
                int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")
            )
            local_world = _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])[node]
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"this is a step of a Slurm job, but its variables do not give this process's rank ({error!r}): start "
                "it with srun --nodes --ntasks --ntasks-per-node, or set RANK, WORLD_SIZE and LOCAL_RANK"
            ) from None
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if world > 1 and missing:
            raise UserError(
                f"srun started {world} tasks, and the environment does not set {' and '.join(missing)}: export the "
                "first node's name and a free port before srun, as slurm/train.sbatch does"
            )
        return cls(rank=rank, world=world, local_rank=local_rank, local_world=local_world)


def replica_launch(shard: int | None, launch: Launch) -> Launch:
    """This rank's place in its replica of the student, which is sharded over `shard` ranks; None: over all.

    Raises:
        UserError: they do not divide the world.
    """
    n = launch.world // launch.replicas if shard is None else shard
    if launch.separate is not None and n * launch.replicas != launch.world:
        raise UserError(
            f"distributed.shard is {n}, and this replica is a launch of {launch.world // launch.replicas} ranks: leave "
            "the key out, or start each replica on as many"
        )
    if launch.world % n:
        divisors = ", ".join(str(d) for d in range(1, launch.world + 1) if launch.world % d == 0)
        raise UserError(
            f"distributed.shard is {n}, but the student has {number_of(launch.world, 'rank')}: replicas of it have "
            f"equally many, so set distributed.shard to one of {divisors}, or start it on a multiple of {n} ranks"
        )
    return replace(launch, rank=launch.rank % n, world=n, local_world=math.gcd(launch.local_world, n))


def vocab_group_size(configured: int | None, launch: Launch, *, sequence: int = 1, of: str = "this run") -> int:
    """p, the ranks of a vocab group: the recipe's number, else the ranks of a node (they share the fastest links).

    `sequence`: n ranks that share each sequence. By default p times n is a node, or nodes. `launch`: of the run, or of
    a replica of the student, as `of` names it.

    Raises:
        UserError: it, or p times n, does not divide the world.
    """
    size = launch.local_world // math.gcd(launch.local_world, sequence) if configured is None else configured
    if launch.world % size:
        divisors = [d for d in range(1, launch.world + 1) if launch.world % d == 0]
        processes = number_of(launch.world, "process", "processes")
        more = f"start it on a multiple of {size} ranks (torchrun --nproc_per_node {size} -m megadistill train RECIPE)"
        if launch.world > 1:
            more = f"it must divide them, so one of {', '.join(map(str, divisors))}; {more}"
        raise UserError(
            f"distributed.vocab_group is {size}, but {of} has {processes}: {more}, or, to try it here, "
            f"--set distributed.vocab_group={divisors[-1]}"
        )
    if launch.world % (size * sequence):
        fits = [d for d in range(1, launch.world // sequence + 1) if launch.world % (d * sequence) == 0]
        raise UserError(
            f"distributed.vocab_group {size} times distributed.sequence {sequence} is {size * sequence}, which does "
            f"not divide the {number_of(launch.world, 'process', 'processes')} of {of}, and ranks that share "
            "sequences are of different vocab groups: set distributed.vocab_group to "
            f"{' or '.join(map(str, fits)) or '1'}"
            + ("" if fits else ", and distributed.sequence to a number that divides them")
        )
    return size


def _in_slurm_step() -> bool:
    """Whether srun started this process. A batch script's or an allocation's shell has tasks in its variables too."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) < _FIRST_RESERVED_STEP:
        return True
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1":
        logger.warning(
            "one process in a Slurm allocation of %s tasks: to start one process a task, use srun as "
            "slurm/train.sbatch does",
            tasks,
        )
    return False


def _tasks_per_node(tasks: str) -> list[int]:
    """The numbers in Slurm's notation: `2(x3),1` gives 2, 2, 2, 1."""
    counts = []
    for run in tasks.split(","):
        count, _, repeated = run.partition("(x")
        counts += [int(count)] * int(repeated.rstrip(")") or "1")
    return counts
