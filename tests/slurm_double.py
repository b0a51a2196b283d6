"""A double of Slurm's commands, for the shell functions of slurm/lib.sh: nodes with the answers that a test gives."""

import os
import subprocess
from collections.abc import Mapping
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
