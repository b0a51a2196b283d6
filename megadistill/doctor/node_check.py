"""Checks of a node by itself: devices, memory, disk, processes of earlier runs."""

import os
import resource
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import torch

from megadistill.distributed.launch import Launch, raise_open_files
from megadistill.distributed.rendezvous import has_agent_store
from megadistill.distributed.topology import local_device
from megadistill.distributed.watchdog.parent import command_of
from megadistill.doctor.rank_report import RankReport, Status, some
from megadistill.errors import UserError
from megadistill.io import write_file
from megadistill.student.deepspeed_config import active_deepspeed_config
from megadistill.train.checkpoint.attempt import attempt_record
from megadistill.train.checkpoint.versions import versions
from megadistill.train.resilience.stragglers import product_seconds
from megadistill.train.setup.jit_locks import extensions_folder, extensions_of, refuse_stale_jit_locks

WRITTEN_BYTES = 16 << 20
_COMMAND = "train"


def check_node(own: RankReport, folder: Path | None, *, deepspeed: str | None = None) -> None:
    """Checks that one process of a node makes for all of them.

    `folder`, `deepspeed`: the recipe's `run.folder` and `student.deepspeed`, where they are known.
    """
    own.check("JIT locks", lambda: _no_stale_locks(deepspeed), of_node=True)
    if folder is None:
        return
    detail = f"{folder}: written, synced, renamed and read back"
    own.facts["write"] = own.check("run folder", lambda: (written_and_read(folder), detail), of_node=True)
    leftovers = left_of_earlier_runs(folder)
    if leftovers:
        own.add("earlier runs", Status.FAIL, "; ".join(leftovers), of_node=True)
        return
    others = other_runs()
    if others:
        pids = f"{'process' if len(others) == 1 else 'processes'} {some(map(str, others))}"
        own.add("earlier runs", Status.WARN, f"other training here shares the devices: {pids}", of_node=True)
    else:
        own.add("earlier runs", Status.OK, "none of their processes is left")


def check_device(own: RankReport, device: torch.device, *, local_world: int) -> None:
    """A matrix product on this rank's device, its name and its free memory."""
    own.facts["versions"] = versions()
    own.facts["device"] = name = device_name(device)
    own.facts["free"], total = free_memory(device)
    own.facts["host_free"] = host_memory()
    try:
        own.facts["product"] = product_seconds(device)
    except RuntimeError as error:
        own.add("device", Status.FAIL, f"{name} cannot multiply: {str(error).splitlines()[0]}", of_node=True)
        return
    visible = torch.accelerator.device_count()
    if device.type != "cpu" and visible < local_world:
        detail = f"{local_world} ranks share {visible} devices: start one rank per device"
        own.add("device", Status.FAIL, detail, of_node=True)
        return
    own.add("device", Status.OK, f"{name}, {total / 1e9:.0f} GB", of_node=True)


def check_host_limits(own: RankReport, launch: Launch) -> None:
    """Whether rank 0's node, which has the launch's store, can hold the connections of all ranks."""
    if launch.rank > 0 or launch.world == 1:
        return
    limit: int | None = raise_open_files()
    needed, whose = launch.open_files, "the hard limit on open files"
    way_out = "raise it (`ulimit -Hn`; limits.conf, LimitNOFILE of slurmd, --ulimit nofile of a container)"
    if has_agent_store():  # torchrun's agent has the store, and nobody raises its soft limit
        limit, whose = _soft_limit_of(os.getppid()), "the limit on open files of torchrun, which has the store,"
        way_out = f"`ulimit -n {max(65_536, needed)}` before torchrun"
    if limit is not None and limit != resource.RLIM_INFINITY and limit < needed:
        detail = f"{whose} is {limit:,}, and {launch.world:,} ranks need {needed:,}: {way_out}"
        own.add("open files", Status.FAIL, detail)
    else:
        own.add("open files", Status.OK, f"the launch's store may have {needed:,}, as {launch.world:,} ranks need")
    backlog = _listen_backlog()
    if backlog is not None and backlog < launch.world:
        detail = (
            f"net.core.somaxconn is {backlog:,}, and {launch.world:,} ranks connect to the store of this node at once: "
            f"connections that do not fit wait and try again, so the start is slow, or times out: sysctl -w "
            f"net.core.somaxconn={max(4096, launch.world):d}"
        )
        own.add("connections", Status.WARN, detail)


def _soft_limit_of(process: int) -> int | None:
    """The limit on open files of another process of this user; None where the system does not say, or it has none."""
    try:
        limits = Path(f"/proc/{process}/limits").read_text().splitlines()
        (soft,) = [line.split()[3] for line in limits if line.startswith("Max open files")]
        return int(soft)
    except (OSError, ValueError):
        return None


def _listen_backlog() -> int | None:
    """Most connections that may wait to be accepted; None where the system does not say."""
    try:
        return int(Path("/proc/sys/net/core/somaxconn").read_text())
    except (OSError, ValueError):
        return None


def check_devices(own: RankReport) -> None:
    """Checks all devices of a node from one process."""
    for index in range(max(1, torch.accelerator.device_count())):
        check_device(own, local_device(index), local_world=1)
        if any(result.status is Status.FAIL for result in own.results):
            return


def written_and_read(folder: Path) -> float:
    """Writes, syncs, renames and reads a file in the run folder, or in the nearest existing parent; bytes per second.

    A missing run folder is not created: nodes that check at the same time would remove it under each other.

    Raises:
        UserError: the content that is read is not the one that was written. OSError: the disk refuses.
    """
    folder = _nearest(folder)
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(1 << 16) * (WRITTEN_BYTES >> 16)
    try:
        began = time.perf_counter()
        write_file(path, content)
        seconds = time.perf_counter() - began
        if path.read_bytes() != content:
            raise UserError(f"{folder}: a file that was written and renamed has another content when it is read")
    finally:
        with suppress(OSError):
            path.unlink()
    return WRITTEN_BYTES / seconds


def left_of_earlier_runs(folder: Path) -> list[str]:
    """A line for each attempt at this run folder whose first process still runs on this host."""
    lines = []
    for path in sorted((folder / "attempts").glob("*.json")):
        record = attempt_record(path)
        process = record.get("pid")
        if record.get("host") == socket.gethostname() and isinstance(process, int) and _trains(process):
            lines.append(
                f"process {process} of attempt {path.stem} at {folder} still runs here: stop it (kill {process})"
            )
    return lines


def other_runs() -> list[int]:
    """Process ids of all training runs on this host."""
    return sorted(int(path.name) for path in Path("/proc").glob("[0-9]*") if _trains(int(path.name)))


def free_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of this rank's device; a CPU's are the host's."""
    if device.type == "cpu":
        return host_memory(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


def host_memory() -> int:
    """Bytes of the host's memory that this process may still allocate, within the limit of its control group."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, IndexError, ValueError):
        (line,) = [each for each in Path("/proc/meminfo").read_text().splitlines() if each.startswith("MemAvailable:")]
        available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available


def free_space(folder: Path) -> int:
    """Free bytes on the disk of `folder`, whether it exists or not."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    return str(torch.get_device_module(device).get_device_name(device))


def _no_stale_locks(deepspeed: str | None) -> tuple[None, str]:
    extensions: tuple[str, ...] = ()
    with suppress(UserError):  # of the settings, which the check of the recipe reports
        extensions = extensions_of(active_deepspeed_config(deepspeed)[0])
    refuse_stale_jit_locks(extensions)
    return None, f"none that is stale of {', '.join(extensions) or 'no extension'} in {extensions_folder()}"


def _trains(process: int) -> bool:
    """Whether a process of this host is a training run of this package. Process ids are reused, so this is checked."""
    command = command_of(process)
    return any("megadistill" in part for part in command[:6]) and _COMMAND in command
