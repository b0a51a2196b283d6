"""A double of Slurm's commands, for the shell functions of slurm/lib.sh: nodes with the answers that a test gives."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

SRUN = r"""#!/bin/bash
echo "srun $*" >>"$DOUBLE/calls"
for option in "$@"; do case $option in --nodelist=*) list=${option#*=} ;; esac; done
tr , '\n' <<<"$list" | awk '
  NR == FNR { answer[$1] = $0; sub(/^[^ ]+ /, "", answer[$1]); next }
  answer[$1] ~ /^lost/ { print "srun: error: Task launch for StepId=7.0 failed on node " $1 ": no route" >"/dev/stderr"
    lost = 1; next }
  answer[$1] ~ /^silent/ { silent = 1; next }
  { answers[$1] = answer[$1] }
  END {
    if (!lost) for (node in answers) { sub(/^[a-z]+/, "& " node, answers[node]); print answers[node] }
    fflush()
    if (silent) system("sleep 10")
    exit lost
  }' "$DOUBLE/nodes" -
"""
SINFO = r"""#!/bin/bash
awk '{ print $1, ($2 == "down" ? "down*" : "allocated") }' "$DOUBLE/nodes"
"""
SCONTROL = r"""#!/bin/bash
awk '{ print $1 }' "$DOUBLE/nodes"
"""


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with the variables of a job on node n1, whose logs are in `folder`."""
    (folder / "env.sh").write_text("")
    environment = {
        **os.environ,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MEGADISTILL_ENV": str(folder / "env.sh"),
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "n1",
        "LOGS": str(folder),
        **variables,
    }
    return subprocess.run(
        ["bash", "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )


def usable_nodes(folder: Path, nodes: Mapping[str, str], want: int, *, seconds: int = 60) -> tuple[list[str], str, int]:
    """`usable_nodes` of slurm/lib.sh: the nodes, its log, and the number of steps that it started.

    `nodes`: name -> answer of its check (`usable`, `unusable: REASON`), `lost` (srun cannot reach it, and ends the step
    of all), `silent` (it never answers) or `down` (Slurm calls it so). `seconds`: time limit of the checks.
    """
    logs, commands = folder / "logs", folder / "commands"
    for made in (logs, commands):
        made.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("sinfo", SINFO), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (folder / "nodes").write_text("".join(f"{name} {answer}\n" for name, answer in nodes.items()))
    (folder / "calls").write_text("")
    path = f"{commands}:{os.environ['PATH']}"
    script = f". slurm/lib.sh; CHECK_SECONDS={seconds}; sleep() {{ command sleep 0.05; }}; usable_nodes LIST {want}"
    done = shell(script, logs, PATH=path, DOUBLE=str(folder))
    return done.stdout.split(), done.stderr, len((folder / "calls").read_text().splitlines())


REPLICA_SRUN = r"""#!/bin/bash
for option in "$@"; do case $option in --nodelist=*) list=${option#*=} ;; esac; done
case "$*" in *check-node.sh*)
  touch "$DOUBLE/checks"
  while [ -e "$DOUBLE/slow" ]; do sleep 0.05; done
  for node in ${list//,/ }; do
    if grep -qx "$node" "$DOUBLE/bad"; then echo "unusable $node: broken"; else echo "usable $node"; fi
  done
  exit ;;
esac
ends() { # CODE [REASON]: of all ranks
  local rank=0 node
  for node in ${list//,/ }; do
    echo "$rank: megadistill: ${2:-says $1}" >>"$LOGS/$node.err"
    echo "$((rank++)) $1" >>"$LOGS/$node.codes"
  done
  exit "$1"
}
finish() { touch "$RUN/DONE"; ends 0; }
until_done() { until [ -e "$RUN/DONE" ]; do sleep 0.05; done; ends 0; }
until_log() { until [ "$(grep -c "$1" "$DOUBLE/log")" -ge "${2:-1}" ]; do sleep 0.05; done; } # TEXT [LINES]
until_starts() { until [ "$(wc -l <"$DOUBLE/starts")" -ge "$1" ]; do sleep 0.05; done; }
until_notice() {
  trap 'echo "$START" >>"$DOUBLE/notices"; ends 3' USR2
  touch "$DOUBLE/waits.$START"
  while :; do sleep 0.05; done
}
lose() { sed -i "/^$1\$/d" "$DOUBLE/job"; } # NODE
breaks() { echo "$1" >>"$DOUBLE/bad"; } # NODE
is_mended() { sed -i "/^$1\$/d" "$DOUBLE/bad"; } # NODE
attempt() { # as the replica that leads writes it
  mkdir -p "$RUN/attempts"
  echo "{\"SLURM_JOB_ID\": \"$SLURM_JOB_ID\", \"MASTER_PORT\": \"$MASTER_PORT\"}" >"$RUN/attempts/00001.json"
}
checkpoint() { mkdir -p "$RUN/checkpoints/step-$1"; } # STEP
end_store() { kill -KILL "$(cat "$DOUBLE/newest-store")"; }
START=${LOGS##*/} REPLICA=$MEGADISTILL_REPLICA
read_from="$REPLICA|$MEGADISTILL_REPLICAS|$list|$MASTER_ADDR|$MASTER_PORT|$MEGADISTILL_STORE"
echo "${START#*.}|$read_from|$*" >>"$DOUBLE/starts"
. "$DOUBLE/body"
"""
REPLICA_SINFO = r"""#!/bin/bash
tr , '\n' <<<"$4" | awk '{ print $1, "allocated" }'
"""
REPLICA_SCONTROL = r"""#!/bin/bash
[ "$2" != hostnames ] || tr , '\n' <<<"$3"
"""
REPLICA_SQUEUE = r"""#!/bin/bash
[ "${*: -1}" != %N ] || paste -sd , "$DOUBLE/job"
"""
STORE = """\
import os, pathlib, socket, sys
server = socket.create_server(("", int(sys.argv[-1])), reuse_port=True)
pathlib.Path(os.environ["DOUBLE"], f"store-{os.getpid()}").touch()
pathlib.Path(os.environ["DOUBLE"], "newest-store").write_text(str(os.getpid()))
while True:
    server.accept()[0].close()
"""


@dataclass(frozen=True)
class ReplicaStart:
    """A step of srun, with what a replica reads from its environment."""

    replica: str
    replicas: str
    nodes: str
    address: str
    port: str
    store: str
    command: str
    """All arguments of srun."""


class ReplicaJob:
    """slurm/replicas.sbatch with doubles of Slurm's commands, on nodes n1, n2, ...

    A replica is a shell script that knows its REPLICA, its START (`K.N`, the N-th start of all, one of replica K), and
    the functions of `REPLICA_SRUN`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_folder, self._commands = folder, folder / "run", folder / "commands"
        self._commands.mkdir()
        self.run_folder.mkdir()
        doubles = {"srun": REPLICA_SRUN, "sinfo": REPLICA_SINFO, "scontrol": REPLICA_SCONTROL, "squeue": REPLICA_SQUEUE}
        for name, text in doubles.items():
            (self._commands / name).write_text(text)
            (self._commands / name).chmod(0o755)
        for name in ("starts", "notices", "bad", "log"):
            (folder / name).touch()
        (folder / "store.py").write_text(STORE)

    def start(
        self,
        body: str,
        *,
        nodes: int = 4,
        per_replica: int = 2,
        spares: int = 0,
        retry_seconds: int = 60,
        last_seconds: int = 60,
        bad_nodes: Sequence[str] = (),
        settings: str = "",
    ) -> "subprocess.Popen[str]":
        """The job, with the script of its replicas. `settings`: further lines of the env file."""
        names = [f"n{number}" for number in range(1, nodes + 1)]
        (self.folder / "job").write_text("".join(f"{name}\n" for name in names))
        (self.folder / "bad").write_text("".join(f"{name}\n" for name in bad_nodes))
        (self.folder / "body").write_text(body)
        (self.folder / "env.sh").write_text(
            f"MEGADISTILL=(python -m megadistill) RECIPE=mine.yaml RUN_FOLDER={self.run_folder} OVERRIDES=()\n"
            f"RANKS_PER_NODE=1 REPLICA_NODES={per_replica} SPARES={spares} SETTLE_SECONDS=2\n"
            f"RETRY_SECONDS={retry_seconds} LAST_SECONDS={last_seconds}\n"
            f"STORE_SERVER=({sys.executable} {self.folder}/store.py)\n{settings}\n"
        )
        script = "sleep() { command sleep 0.05; }; . slurm/replicas.sbatch"
        with open(self.folder / "log", "w") as log:
            return subprocess.Popen(
                ["bash", "-c", script],
                cwd=ROOT,
                env=self._environment(names),
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def run(self, body: str, **options: object) -> tuple[int, str]:
        """The job's exit code and log."""
        return self.end(self.start(body, **options)), self.log()  # type: ignore[arg-type]

    def end(self, running: "subprocess.Popen[str]") -> int:
        """The exit code of a job that ends by itself; one that does not is ended with all of its steps."""
        try:
            return running.wait(timeout=100)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise AssertionError(f"the job has not ended:\n{self.log()}") from None

    def _environment(self, nodes: Sequence[str]) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{self._commands}:{os.environ['PATH']}",
            "DOUBLE": str(self.folder),
            "RUN": str(self.run_folder),
            "MEGADISTILL_ENV": str(self.folder / "env.sh"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()),  # it decides the store's port
            "SLURMD_NODENAME": "localhost",
            "SLURM_JOB_NUM_NODES": str(len(nodes)),
            "SLURM_JOB_NODELIST": ",".join(nodes),
            "SLURM_CPUS_ON_NODE": "4",
        }

    def shell(self, script: str) -> "subprocess.CompletedProcess[str]":
        """A script in the environment of the job."""
        (self.folder / "env.sh").touch()
        return subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=self._environment(["n1"]), capture_output=True, text=True, check=True
        )

    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")

    def starts(self) -> list[ReplicaStart]:
        """In the order of their numbers; each writes its line when it runs."""
        lines = (self.folder / "starts").read_text(encoding="utf-8").splitlines()
        rows = sorted((line.split("|", 7) for line in lines), key=lambda row: int(row[0]))
        return [ReplicaStart(*row[1:]) for row in rows]

    def notices(self) -> list[str]:
        return (self.folder / "notices").read_text(encoding="utf-8").split()

    def stores(self) -> list[int]:
        """The process of each store that was started."""
        return [int(path.name.partition("-")[2]) for path in self.folder.glob("store-*")]

    def await_end_of_stores(self, count: int) -> None:
        """Waits for the end of all stores, of which there were so many."""
        assert len(self.stores()) == count, self.log()
        self.wait_for("the stores have ended", lambda: not any(map(_runs, self.stores())))

    def earlier_attempt(self) -> None:
        """An attempt of a former job, which Slurm no longer runs."""
        (self.run_folder / "attempts").mkdir()
        (self.run_folder / "attempts/00001.json").write_text('{"SLURM_JOB_ID": "3"}')

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, f"not within 60 s: {what}\n{self.log()}"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
