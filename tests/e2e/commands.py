"""Runs the commands that a user types, as a user types them: a process, its output, its exit code.

A process imports for five seconds before it does anything. Where that is not the point, `in_process` is the same
command without it: what makes no process group leaves nothing behind here.
"""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from megadistill.cli.main import run_command
from tests.paths import ROOT

BIN = Path(sys.executable).parent
TORCHRUN_2 = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "megadistill")
DEEPSPEED_2 = (str(BIN / "deepspeed"), "--num_gpus", "2", "--module", "megadistill")
PLAIN = (str(BIN / "megadistill"),)


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def transcript(self) -> str:
        return f"exit {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


def environment() -> dict[str, str]:
    """The caller's, less what a launcher set, and with one thread a process."""
    variables = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**variables, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def run(*command: str, timeout: float = 180.0) -> Finished:
    """The command, from the root of the checkout."""
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    return Finished(done.returncode, done.stdout, done.stderr)


def succeed(*command: str, timeout: float = 180.0) -> Finished:
    return succeeded(run(*command, timeout=timeout))


def succeeded(finished: Finished) -> Finished:
    assert finished.code == 0, finished.transcript
    return finished


def in_process(*arguments: str) -> Finished:
    """`megadistill` with these arguments, in the tests' own process, from the root of the checkout."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(ROOT),
        patch.dict(os.environ, COLUMNS="160"),
    ):
        code = run_command(arguments)
    return Finished(code, out.getvalue(), err.getvalue())


def settings(**values: object) -> list[str]:
    """`--set` for each value; `__` stands for a dot."""
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
