"""Runs many commands in one forked process, each with a time limit, all with a memory limit.

A command that ends the process, or does not come back, costs its own case alone: the next process takes up the rest.
"""

import contextlib
import faulthandler
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.fuzz.odd_files import put
from tests.fuzz.outcome import Outcome
from tests.ranks.harness import CONTEXT

MEMORY = 3 << 30
"""Bytes that a case may take on top of what the imports have taken."""
FILE = 256 << 20
"""Bytes of the largest file that a case may write."""
SECONDS = 30.0
"""Time of a case before it is interrupted; it is killed after twice that."""
PROCESSES = 2


@dataclass(frozen=True)
class Case:
    """A command, and the file that is odd while it runs."""

    name: str
    command: tuple[str, ...]
    file: str | None = None
    """Path of the odd file, relative to the folder of the commands."""
    content: str = ""
    """A name of `odd_files.KINDS`."""


class _TimeIsUp(BaseException):
    """No Exception: a command that catches those must not go on."""


def outcomes(cases: Sequence[Case], folders: Sequence[Path], original: Path, *, trains: bool = False) -> list[Outcome]:
    """The outcome of each case. Each of `folders` is a copy of `original`, for one process at a time.

    Args:
        trains: `train` trains; otherwise it ends where it would have made its process groups.
    """
    results: list[Outcome] = [Outcome(None, ended="not run")] * len(cases)

    def share(number: int) -> None:
        own = list(range(number, len(cases), len(folders)))
        while own:
            done = _one_process([cases[each] for each in own], folders[number], original, trains)
            for place, outcome in zip(own, done, strict=False):
                results[place] = outcome
            own = own[len(done) :]

    threads = [threading.Thread(target=share, args=(number,)) for number in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _one_process(cases: Sequence[Case], folder: Path, original: Path, trains: bool) -> list[Outcome]:
    """The outcomes of the first cases, at least one: up to the one that ends the process, if one does."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_serve, args=(list(cases), folder, original, trains, theirs))
    process.start()
    theirs.close()
    done: list[Outcome] = []
    while len(done) < len(cases):
        if not ours.poll(2 * SECONDS + 20.0 * (not done)):
            done.append(Outcome(None, ended=f"did not end within {2 * SECONDS:.0f} s, and took no signal"))
            break
        try:
            outcome = pickle.loads(ours.recv_bytes())
            if outcome is None:
                break
            done.append(outcome)
        except EOFError:
            process.join(timeout=10)
            done.append(Outcome(None, ended=f"the process died: exit code {process.exitcode}"))
            break
    process.kill()
    process.join()
    return done


def _serve(cases: Sequence[Case], folder: Path, original: Path, trains: bool, pipe: Connection) -> None:
    import torch.distributed as dist

    from megadistill.cli import main

    _prepare(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(main, "parser", cache(main.parser)))  # it takes as long as reading a recipe
        stack.enter_context(patch("matplotlib.figure.Figure.savefig", _written))  # a page has fifteen of them
        if not trains:
            stack.enter_context(patch("megadistill.train.loop.train", _until_process_groups))
        untouched = _files(folder)
        for case in cases:
            outcome = run_case(case)
            os.chdir(folder)
            if _files(folder) != untouched:
                renew(original, folder)
                untouched = _files(folder)
            pipe.send_bytes(pickle.dumps(outcome))
            if dist.is_initialized():  # what a fault leaves to the end of its process
                break
        pipe.send_bytes(pickle.dumps(None))


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of each file: they tell whether one has changed."""
    files = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        files[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return files


def renew(original: Path, folder: Path) -> None:
    """Makes `folder`, which may be a process's current one, a copy of `original`."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(original, folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("fifo"))
    os.mkfifo(folder / "fifo")


def _written(self: Any, file: Any, **_: Any) -> None:
    """Takes the place of drawing a picture."""
    content = b"<svg></svg>"
    if hasattr(file, "write"):
        file.write(content)
    else:
        Path(file).write_bytes(content)


def _until_process_groups(recipe: Any, **_: Any) -> None:
    from megadistill.distributed.launch import Launch
    from megadistill.train.setup.plausibility import implausible_settings
    from megadistill.train.setup.setup import prepare

    implausible_settings(prepare(recipe, Launch.from_environment()))


def in_new_process(folder: Path, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function in `folder`, in a process of its own; fails if it does."""
    process = CONTEXT.Process(target=_call, args=(folder, function, arguments))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0, f"{function.__name__}: exit code {process.exitcode}"


def _call(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _prepare(folder)
    function(*arguments)


def _prepare(folder: Path) -> None:
    """This process works in `folder`, with a home and temporary files beside it, within the memory limit."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    beside = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "home/cache", "TORCH_EXTENSIONS_DIR": "home/ext"}
    for variable, name in beside.items():
        path = folder.parent / name
        path.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(path)
    os.environ.update(COLUMNS="160", HF_HUB_OFFLINE="1")
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    signal.signal(signal.SIGALRM, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    raise _TimeIsUp


def run_case(case: Case) -> Outcome:
    """Runs one command in this process, which `_prepare` has prepared."""
    from megadistill.cli.main import run_command

    if case.file is not None:
        put(case.file, case.content)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code: int | None = None
        ended = ""
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
            code = run_command(case.command)
        except SystemExit as exit:  # --help
            code = int(exit.code or 0)
        except _TimeIsUp:
            code, ended = None, f"did not end within {SECONDS:.0f} s"
            faulthandler.dump_traceback(file=err)
        except BaseException as error:
            code, ended = None, f"raised {type(error).__name__}: {error}"[:300]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
        return Outcome(code, _text(out), _text(err), ended)


def _text(file: Any) -> str:
    """The first megabyte."""
    file.seek(0)
    content: bytes = file.read(1 << 20)
    return content.decode(errors="surrogateescape")
