"""A real Slurm of a few nodes on this machine, and jobs on it as a person submits them: the sbatch files themselves."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
SCRIPTS = Path(__file__).parent / "cluster"
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def missing() -> str | None:
    """Why no Slurm can be started here, and what would change that."""
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() != 0:
        return "nodes are network namespaces, which need root"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}; a privileged container has them"


def until(what: str, holds: Callable[[], bool], seconds: float, transcript: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{transcript()}"
        time.sleep(0.1)


def environment() -> dict[str, str]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_A_LAUNCHER and not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    }
    return {**variables, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


@dataclass(frozen=True)
class Job:
    """A job and what is known of it. `folder` is that of its run."""

    cluster: "Cluster"
    number: str
    folder: Path

    @property
    def log(self) -> str:
        path = self.folder.parent / f"{self.folder.name}-{self.number}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def errors(self) -> str:
        """Standard error of all ranks of all starts."""
        files = sorted(self.folder.glob("logs/*/*/*.err"))
        return "".join(f"--- {path.relative_to(self.folder)}\n{path.read_text(encoding='utf-8')}" for path in files)

    def transcript(self) -> str:
        return f"{self.cluster.call('squeue', '-l')}\n{self.log}\n{self.errors}"

    def field(self, key: str) -> str:
        """A value of `scontrol show job`."""
        fields = self.cluster.call("scontrol", "show", "job", self.number).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{key}="))

    def ends(self, seconds: float = 120) -> "Job":
        until("the job leaves the queue", lambda: not self._queued(), seconds, self.transcript)
        return self

    def _queued(self) -> bool:
        return bool(self.cluster.call("squeue", "-h", "-j", self.number).strip())

    def says(self, line: str, seconds: float = 90) -> None:
        until(f"the log says {line!r}", lambda: line in self.log, seconds, self.transcript)

    def reaches(self, step: int, seconds: float = 90) -> None:
        until(f"step {step}", lambda: self._step() >= step, seconds, self.transcript)

    def _step(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def notify(self) -> None:
        """The notice before the time limit, as `--signal=B:USR2@…` sends it.

        For a task of an array scancel 22.05 sends it again and again until the task has ended, and then says that it
        failed: a script has to take all that for one notice.
        """
        running = self.cluster.call("squeue", "-h", "-t", "R", "-j", self.number, "-o", "%A").split()
        self.cluster.call("scancel", "--batch", "--signal=USR2", running[0], check=False)

    def events(self, kind: str) -> list[dict[str, object]]:
        lines = (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


class Cluster:
    """Nodes n1, n2, … and what may befall them."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self._environment = {
            **environment(),
            "CLUSTER_DIR": str(folder),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "NODES": str(nodes),
        }
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]

    def call(self, *command: str, check: bool = True, variables: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self._environment, **(variables or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def node(self, act: str, node: str, *arguments: str) -> None:
        self.call(str(SCRIPTS / "node.sh"), act, node, *arguments)

    def submit(self, script: str, folder: Path, *options: str, **settings: str) -> Job:
        """`settings`: further lines of the env file."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.parent / f"{folder.name}.env.sh"
        lines = {
            "MEGADISTILL": f"({sys.executable} -m megadistill)",
            "RUN_FOLDER": str(folder),
            "SPARES": "0",
            "NODE_CHECK": "(true)",
            **settings,
        }
        file.write_text("".join(f"{key}={value}\n" for key, value in lines.items() if value), encoding="utf-8")
        variables = {
            "SBATCH_GPUS_PER_NODE": "1",
            "SBATCH_TIMELIMIT": "10",
            "SBATCH_OUTPUT": str(folder.parent / f"{folder.name}-%A.log"),
            "MEGADISTILL_ENV": str(file),
        }
        number = self.call("sbatch", "--parsable", *options, f"slurm/{script}.sbatch", variables=variables).strip()
        return Job(self, number, folder)

    def cancel_all(self) -> None:
        self.call("scancel", f"--user={os.geteuid()}", check=False)

    def are_idle(self) -> None:
        """All nodes are up, and no job has them."""

        def states() -> list[str]:
            return self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

        until("all nodes are idle", lambda: states() == ["idle"] * len(self.nodes), 60, lambda: " ".join(states()))


@contextmanager
def started(nodes: int) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="mdslurm", dir="/tmp"))  # a socket's path may not be long
    cluster = Cluster(folder, nodes)
    try:
        cluster.call(str(SCRIPTS / "start.sh"))
        yield cluster
    finally:
        cluster.call(str(SCRIPTS / "stop.sh"))
        shutil.rmtree(folder)
