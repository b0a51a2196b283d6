"""The file systems of the Python environment: a shared one serves the imports of all ranks at each start."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import megadistill
from megadistill.doctor.rank_report import RankReport, Status
from megadistill.io import read_file
from megadistill.units import number_of

MOUNTS = Path("/proc/self/mountinfo")
LARGE_JOB = 16
"""Nodes of a job above which an environment on a network file system is reported."""
OPENS_OF_A_START = 7_000
"""Files that a rank opens for its imports, about (tests/scale/test_start.py); each is looked for in several places."""

NETWORK = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
    *("orangefs", "panfs", "pvfs2", "smb3", "virtiofs", "wekafs"),
}
"""Kinds of file systems that other hosts serve."""
LOCAL_FUSE = ("fuse.squashfuse", "fuse.fuse-overlayfs", "fuse.gocryptfs", "fuse.portal", "fuseblk")
"""Beginnings of the names of those that a process of this host serves from files of its own, as of a container."""


@dataclass(frozen=True)
class Mount:
    """A mounted file system. `kind`: `ext4`, `nfs4`, `fuse.sshfs`; `source`: its device or server."""

    folder: Path
    kind: str
    source: str

    @property
    def is_network(self) -> bool:
        return self.kind in NETWORK or (self.kind.startswith("fuse.") and not self.kind.startswith(LOCAL_FUSE))


def read_mounts(table: Path = MOUNTS) -> list[Mount]:
    """The mounts of this process, later ones behind; none where the system has no such table."""
    try:
        lines = read_file(table).decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return []
    mounts = []
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if separator and len(fields) > 4 and len(kinds) > 1:
            mounts.append(Mount(Path(_unescaped(fields[4])), kinds[0], _unescaped(kinds[1])))
    return mounts


def _unescaped(text: str) -> str:
    """The kernel writes a space as its number in base 8."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """The mount that holds a path: the deepest, and of several at one place the last."""
    path = path.resolve()
    holding = [mount for mount in mounts if path.is_relative_to(mount.folder)]
    return max(reversed(holding), key=lambda mount: len(mount.folder.parts), default=None)


def check_environment(own: RankReport, *, nodes: int, ranks: int | None = None, table: Path = MOUNTS) -> None:
    """Whether the files that each rank imports lie on a network file system, in a job of more than `LARGE_JOB` nodes.

    `ranks`: those of the job, if they are known.
    """
    mounts = read_mounts(table)
    shared: dict[tuple[str, str], list[str]] = {}
    for name, place in _places():
        mount = mount_of(place, mounts)
        if mount is not None and mount.is_network:
            shared.setdefault((mount.kind, mount.source), []).append(f"{name} ({place})")
    if not shared:
        own.add("environment", Status.OK, f"{sys.prefix} is on no network file system")
        return
    where = "; ".join(f"{', '.join(names)} on {kind} of {source}" for (kind, source), names in shared.items())
    if nodes <= LARGE_JOB:
        own.add("environment", Status.OK, f"{where}: shared, fit for up to {LARGE_JOB} nodes")
        return
    opens = f"{OPENS_OF_A_START:,} files a rank"
    if ranks is not None:
        opens = f"{OPENS_OF_A_START * ranks / 1e6:,.0f} million files at each start"
    detail = (
        f"{where}: {number_of(nodes, 'node')} import from it, about {opens}, which takes minutes: use a container "
        "image, or send the environment to the nodes' own disks first (docs/slurm.md, Environment)"
    )
    own.add("environment", Status.WARN, detail)


def _places() -> Iterator[tuple[str, Path]]:
    yield "environment", Path(sys.prefix)
    yield "megadistill", Path(megadistill.__file__).parent
    yield "torch", Path(torch.__file__).parent


def nodes_of_job(environment: Mapping[str, str] = os.environ) -> int:
    """Nodes of this Slurm job, those of all its components; 1 outside of one."""
    names = [name for name in environment if re.fullmatch(r"SLURM_JOB_NUM_NODES(_HET_GROUP_\d+)?", name)]
    parts = [name for name in names if "HET" in name] or names
    return sum(int(environment[name]) for name in parts if environment[name].isdigit()) or 1
