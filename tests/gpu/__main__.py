"""Checks and measurements of the package on one NVIDIA GPU, in ten minutes.

Needs a GPU and torch, triton, transformers and numpy; the other packages are installed from a folder of wheels
(`make gpu-wheels`), without a network. Each check is a process with a time limit of its own; results are written after
each of them. Exit code 1: a check failed; 2: nothing can be run here.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.gpu import wheels
from tests.gpu.checks import CHECKS, Check, named
from tests.gpu.results import Record, Results
from tests.gpu.runner import NO_ANSWER, Place, Runner

ROOT = Path(__file__).resolve().parents[2]

FACTS = """
import json, os, platform, shutil, sysconfig, torch
facts = {"device": "none", "python": platform.python_version(), "torch": torch.__version__}
# What Triton builds its launchers with.
facts["C compiler"] = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang") or "none"
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
facts["Python.h"] = "present" if os.path.exists(header) else "none"
for name in ("triton", "transformers", "deepspeed", "liger_kernel"):
    try:
        from importlib.metadata import version
        facts[name] = version(name)
    except Exception:
        facts[name] = "none"
if torch.cuda.is_available():
    at = torch.cuda.get_device_properties(0)
    facts["device"] = at.name
    facts["memory"] = f"{at.total_memory / 2**30:.0f} GiB"
    facts["compute capability"] = f"{at.major}.{at.minor}"
    facts["CUDA"] = str(torch.version.cuda)
    facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(facts))
"""
"""A program of its own: this process never makes a context on the device."""


class Refusal(Exception):
    """Nothing can be run here: one line that says why, and the way out."""


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser("python -m tests.gpu", description=__doc__)
    options.add_argument(
        "--out", type=Path, metavar="FOLDER", help="page, JSON and log (default: the repository's page)"
    )
    options.add_argument("--stand-in", action="store_true", help="a CPU instead of a GPU, tiny sizes: the code alone")
    options.add_argument("--only", type=_checks, default=CHECKS, metavar="NAMES", help="some checks, by commas")
    options.add_argument("--minutes", type=float, default=9.5, help="of all checks together (default %(default)s)")
    options.add_argument("--wheels", type=Path, default=ROOT / "wheels-gpu", metavar="FOLDER")
    options.add_argument("--check", type=named, help=argparse.SUPPRESS)
    options.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return options.parse_args()


def _checks(names: str) -> Sequence[Check]:
    """In the order of `CHECKS`, whatever the order of the names."""
    chosen = [name for name in names.split(",") if name]
    unknown = sorted(set(chosen) - {check.name for check in CHECKS})
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown) or 'nothing'} is no check; there are {', '.join(check.name for check in CHECKS)}"
        )
    return [check for check in CHECKS if check.name in chosen]


def _facts(environment: dict[str, str], *, stand_in: bool) -> dict[str, str]:
    """Device and versions.

    Raises:
        Refusal: there is no torch, or it has no CUDA device.
    """
    command = [sys.executable, "-c", FACTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it printed no reason"]
        raise Refusal(f"torch cannot be imported by {sys.executable}: {lines[-1]}")
    facts: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    if stand_in:
        return {**facts, "device": "a CPU as a stand-in"}
    if facts["device"] == "none":
        raise Refusal(
            f"torch {facts['torch']} sees no CUDA device here: run this on a machine with an NVIDIA GPU, or "
            "`make gpu STAND_IN=1` to run the same code on a CPU"
        )
    return facts


def _environment(scratch: Path, folder: Path) -> dict[str, str]:
    """Of the checks' processes, after what is missing was installed.

    Raises:
        WheelError: something is missing, and the folder of wheels does not have it.
    """
    paths = [str(ROOT)]
    if wheels.missing_packages():
        site = scratch / "site"
        wheels.install(folder, site)
        paths.insert(0, str(site))
    if above := os.environ.get("PYTHONPATH"):
        paths.append(above)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # All is on one host, which may have no other interface.
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_NET": "Socket",
    }


def _commit() -> str:
    """Of the tree, with `+` where files differ from it; "unknown" in a copy without git."""
    try:
        command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_all(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        try:
            facts = _facts(dict(os.environ), stand_in=arguments.stand_in)
            environment = _environment(scratch, arguments.wheels)
        except (Refusal, wheels.WheelError) as refusal:
            print(f"error: {refusal}", file=sys.stderr)
            return 2
        facts = _facts(environment, stand_in=arguments.stand_in)  # with the versions of the wheels
        results = Results(arguments.stand_in, facts, _commit(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
        place = Place.of(arguments.out, ROOT, scratch, stand_in=arguments.stand_in)
        print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        # Kernels too: the home of this user may not be writable, or not there.
        caches = {"TMPDIR": "", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        environment |= {name: str(scratch / below) for name, below in caches.items()}
        good = Runner(results, place, environment, ROOT, deadline).run_all(arguments.only)
        print(f"{place.page}, {place.json}", flush=True)
        return 0 if good else 1


def run_check(check: Check, rows: Path, *, stand_in: bool) -> int:
    """One check, in this process."""
    from tests.gpu.device import NotMeasurable, open_device

    record = Record(rows)
    try:
        importlib.import_module(f"tests.gpu.{check.name}").run(open_device(stand_in=stand_in), record)
    except NotMeasurable as reason:
        print(reason, flush=True)
        return NO_ANSWER
    if record.failures:
        print("; ".join(record.failures), flush=True)
    return 1 if record.failures else 0


def main() -> int:
    arguments = _arguments()
    # A batch system ends a job by SIGTERM: the check that runs must not outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    if arguments.check is not None:
        return run_check(arguments.check, arguments.rows, stand_in=arguments.stand_in)
    return run_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
