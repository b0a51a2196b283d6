"""The shell functions of the sbatch files that need no Slurm."""

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def _shell(script: str, folder: Path, **variables: str) -> str:
    (folder / "env.sh").write_text("")
    environment = {
        **os.environ,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MEGADISTILL_ENV": str(folder / "env.sh"),
        "SLURM_JOB_ID": "7",
        "LOGS": str(folder),
        **variables,
    }
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_rank_that_aborts_is_no_reason_to_hold_the_run(tmp_path: Path) -> None:
    """A stand-in for `std::terminate`, with which torch's NCCL watchdog ends a process."""
    abort = 'bash slurm/rank.sh "$PYTHON" -c "import os, sys; print(\'lost\', file=sys.stderr, flush=True); os.abort()"'
    ended = 'bash slurm/rank.sh "$PYTHON" -c "raise SystemExit(3)"'
    script = f"SLURM_PROCID=1 {abort}; SLURM_PROCID=2 {ended}; . slurm/lib.sh; log_ends; first_rank_with 2 4 || echo ok"
    output = _shell(script, tmp_path, PYTHON=sys.executable)
    assert (tmp_path / "rank-00001.code").read_text() == "134\n"
    assert "rank 00002 exit code 3" in output
    assert "rank 00001 exit code 134: lost" in output
    assert "exit code 134 is SIGABRT, as torch's NCCL watchdog ends a rank that has lost another one" in output
    assert output.endswith("ok\n"), "such a rank does not hold the run"


def test_a_job_raises_its_limit_on_open_files(tmp_path: Path) -> None:
    line = next(line for line in (ROOT / "slurm/env.sh.example").read_text().splitlines() if line.startswith("ulimit"))
    soft, hard = _shell(f"ulimit -Sn 64; {line}\nulimit -Sn; ulimit -Hn", tmp_path).split()
    assert soft == hard
