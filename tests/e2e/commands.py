"""Runs the commands that a user types, as a user types them: a process, its output, its exit code.

A process imports for five seconds before it does anything. Where that is not the point, `in_process` is the same
command without it, as what makes no process group leaves nothing behind here; `forked` has a process of its own.
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from megadistill.cli.main import main, run_command
from tests.paths import ROOT
from tests.ranks.harness import CONTEXT

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


def forked(*arguments: str, folder: Path = ROOT, timeout: float = 180.0, **variables: str) -> Finished:
    """`megadistill` with these arguments, from `folder`, in a process that finds everything imported."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        process = CONTEXT.Process(target=_command, args=(arguments, folder, environment() | variables, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        return Finished(process.exitcode or 0, *(path.read_text() if path.exists() else "" for path in (out, err)))


def _command(arguments: Sequence[str], folder: Path, variables: Mapping[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    sys.argv = ["megadistill", *arguments]
    main()


def settings(**values: object) -> list[str]:
    """`--set` for each value; `__` stands for a dot."""
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
