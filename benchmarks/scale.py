"""The cost of a start, a step, a save, a resume and a fault as ranks are added: real processes on this machine, joined
by gloo, training a tiny model.

    python -m benchmarks.scale --help
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.measure import Spread
from benchmarks.report import ROOT, Report, parser

QUESTIONS = ("growth", "fault")
MEASURED = ("megadistill", "benchmarks/scale.py", "benchmarks/scale_ranks.py")
STEPS = 9
"""Steps of a run: one before it is stopped, the others after it has resumed."""
ROWS = 2
"""Sequences of a step, a rank: each has the same work in every world."""
WAIT_SECONDS = 900.0

HELP = """\
questions (both, when --only does not choose):
  growth  the same run of a tiny student on 2 to 32 processes (--worlds): its first start, one step and a save; then it
          resumes from that checkpoint and takes 8 steps. A rank has the same work in every world. Each column has a
          line fitted by least squares, in seconds a rank.
  fault   SIGKILL to a rank of a run of --fault-world processes: seconds until all ranks have ended, and until the next
          useful step (one that no attempt had taken) of the attempt that is started at once. Both with processes that
          have everything imported, and with new interpreters, as srun starts them.

how to read it:
  * Processes share this machine's cores, so wall times grow by a rank's work / cores: on a cluster each rank has cores
    of its own. The columns that carry over are *CPU seconds a rank*: if nothing grows with the world their slope is 0.
    A rank that does something for each other rank (opens its file, reads its heartbeat) has a slope above 0, and the
    job's total grows with the square of the world. gloo's own collectives, which are rings, have one: a step here is
    dominated by them, as NCCL's on a cluster are not (megadistill plan counts those).
  * Slopes are of ranks, expectations for 512 and 4,096 ranks are in docs/scale.md, with the counts behind them.
  * --package FOLDER measures the megadistill of another checkout, such as an earlier commit's: run both on an idle
    machine, one after the other."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run, and what its files say of it. Times are those of the wall clock."""

    began: float
    ends: list[dict[str, float]]
    metrics: list[dict[str, Any]]
    """Steps that this attempt took."""
    events: list[dict[str, Any]]

    @property
    def to_first_step(self) -> float:
        """Seconds from the start of the processes to the end of the first step."""
        return float(self.metrics[0]["time"]) - self.began

    @property
    def cpu(self) -> float:
        """CPU seconds of a rank, the mean of all."""
        return statistics.fmean(end["cpu"] for end in self.ends)

    @property
    def save(self) -> dict[str, Any]:
        return next(event for event in self.events if event["event"] == "checkpoint_saved")


class Run:
    """A run folder, and the command that trains in it."""

    def __init__(
        self, folder: Path, data: Path, package: Path, *, world: int, forked: bool, **settings: object
    ) -> None:
        self.folder, self._package, self._world, self._forked = folder, package, world, forked
        values: dict[str, object] = {
            "run.folder": folder,
            "data.manifest": data / "train/manifest.json",
            "distributed.vocab_group": 2,
            "distributed.timeout_minutes": 5,
            "student.config.hidden_size": 32,
            "student.config.intermediate_size": 64,
            "student.config.num_attention_heads": 2,
            "student.config.num_key_value_heads": 1,
            "student.vocab_multiple": 512,
            "train.schedule.kind": "cosine",
            "train.schedule.decay_steps": "null",
            "train.schedule.warmup_steps": 0,
            "train.steps": STEPS,
            "train.micro_batch": ROWS,
            "train.global_batch": ROWS * world,
            "train.checkpoint_every": 1000,
            "resilience.teacher_hash_every": 0,
            **settings,
        }
        overrides = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        self._command = ["train", str(package / "recipes/smoke-labels.yaml"), *overrides]
        self._attempts = 0

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl` or `events.jsonl` that are whole."""
        path = self.folder / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def start(self, *more: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Starts an attempt: its launcher, and the folder of its logs."""
        self._attempts += 1
        logs = self.folder.parent / f"{self.folder.name}-logs-{self._attempts}"
        logs.mkdir()
        spec = {
            "folder": str(logs),
            "world": self._world,
            "forked": self._forked,
            "arguments": [*self._command, *more],
        }
        (logs / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        script = Path(__file__).with_name("scale_ranks.py")
        environment = {**os.environ, "PYTHONPATH": str(self._package), "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen([sys.executable, str(script), str(logs / "spec.json")], env=environment), logs

    def ended(self, launcher: "subprocess.Popen[bytes]", logs: Path, *, codes: Sequence[int] = (0,)) -> Attempt:
        """The attempt, once its ranks have ended.

        Raises:
            SystemExit: a rank ended with a code that is not in `codes`.
        """
        launcher.wait(WAIT_SECONDS)
        ends = json.loads((logs / "ends.json").read_text(encoding="utf-8"))
        wrong = [end for end in ends["ends"] if end["code"] not in codes]
        if wrong:
            log = logs / f"rank-{wrong[0]['rank']:.0f}.log"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise SystemExit("\n".join([f"a rank ended with {wrong[0]['code']} ({log}):", *lines]))
        begin = ends["began"]
        metrics, events = (
            [line for line in self.lines(name) if line["time"] >= begin] for name in ("metrics.jsonl", "events.jsonl")
        )
        return Attempt(begin, ends["ends"], metrics, events)

    def attempt(self, *more: str) -> Attempt:
        return self.ended(*self.start(*more))


def fitted(worlds: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """(value at 0 ranks, slope a rank) of the line through them with the least squares."""
    per_rank, constant = np.polyfit(np.array(worlds, dtype=np.float64), np.array(values, dtype=np.float64), 1)
    return float(constant), float(per_rank)


COLUMNS = {
    "start": "start to first step, s",
    "start_cpu": "CPU of it, s a rank",
    "resume": "resume to first step, s",
    "resume_cpu": "CPU of it and 8 steps, s a rank",
    "step": "step, s",
    "stall": "save stalls, s",
    "write": "save writes, s",
}
"""Measurements of `growth`, and their columns."""


def _growth_of(run: Run) -> dict[str, float]:
    first, resumed = run.attempt("--stop-after", "1"), run.attempt()
    return {
        "start": first.to_first_step,
        "start_cpu": first.cpu,
        "resume": resumed.to_first_step,
        "resume_cpu": resumed.cpu,
        "step": statistics.median(line["seconds"] for line in resumed.metrics[1:]),
        "stall": first.save["stall_seconds"],
        "write": first.save["write_seconds"],
    }


def growth(folder: Path, data: Path, package: Path, worlds: Sequence[int], report: Report) -> Table:
    """Rows of every world, and the fitted slopes."""
    cores = len(os.sched_getaffinity(0))
    shape = f"{', '.join(map(str, worlds))} ranks on {cores} cores"
    table = report.table(f"growth: {shape}", "ranks", *COLUMNS.values())
    medians: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for world in worlds:
        measured = []
        for repeat in range(report.repeats):
            run = Run(folder / f"growth-{world}-{repeat}", data, package, world=world, forked=True)
            measured.append(_growth_of(run))
        spreads = {name: Spread.of([each[name] for each in measured]) for name in COLUMNS}
        for name, spread in spreads.items():
            report.add("growth", COLUMNS[name], f"{world} ranks", spread, "cpu s" if name.endswith("cpu") else "s")
            medians[name].append(spread.median)
        table.add_row(str(world), *(f"{spreads[name].median:.3f}" for name in COLUMNS))
        report.console.print(f"{world} ranks: done", style="dim")
    if len(worlds) > 1:
        lines = {name: fitted(worlds, medians[name]) for name in COLUMNS}
        for name, (constant, per_rank) in lines.items():
            report.add("growth", COLUMNS[name], "fitted: a rank more", per_rank)
            report.add("growth", COLUMNS[name], "fitted: at 0 ranks", constant)
        table.add_section()
        table.add_row("a rank more", *(f"{lines[name][1]:+.4f}" for name in COLUMNS))
        table.add_row("at 0 ranks", *(f"{lines[name][0]:.3f}" for name in COLUMNS))
    return table


def _fault_of(run: Run) -> tuple[float, float]:
    """Seconds from SIGKILL of the last rank to the end of all, and to the next useful step of ranks started then."""
    launcher, logs = run.start()
    _until(lambda: len(run.lines("metrics.jsonl")) >= 5, launcher)
    processes = json.loads((logs / "began.json").read_text(encoding="utf-8"))["processes"]
    os.kill(processes[max(processes, key=int)], signal.SIGKILL)
    killed = time.time()
    launcher.wait(WAIT_SECONDS)
    ended = time.time() - killed
    taken = max(line["step"] for line in run.lines("metrics.jsonl"))
    launcher, logs = run.start()
    _until(lambda: any(line["step"] > taken for line in run.lines("metrics.jsonl")), launcher)
    began = json.loads((logs / "began.json").read_text(encoding="utf-8"))["time"]  # after the imports of forks
    useful: float = next(line["time"] for line in run.lines("metrics.jsonl") if line["step"] > taken) - began
    (run.folder / "STOP").touch()
    run.ended(launcher, logs, codes=(0, 3))
    return ended, ended + useful


def _until(holds: Any, launcher: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not holds():
        if launcher.poll() is not None or time.monotonic() > end:
            raise SystemExit(
                "the ranks ended, or took no step in time: see their logs in the folder (--folder keeps it)"
            )
        time.sleep(0.02)


def fault(folder: Path, data: Path, package: Path, world: int, report: Report) -> Table:
    """Rows of both kinds of processes."""
    table = report.table(f"fault: SIGKILL to one of {world} ranks", "", "all have ended, s", "next useful step, s")
    for forked, name in ((True, "processes with everything imported"), (False, "new interpreters")):
        measured = []
        for repeat in range(report.repeats):
            settings = {"train.checkpoint_every": 2, "train.steps": 100_000}
            place = folder / f"fault-{int(forked)}-{repeat}"
            measured.append(_fault_of(Run(place, data, package, world=world, forked=forked, **settings)))
        ended, useful = (Spread.of([each[place] for each in measured]) for place in (0, 1))
        report.add("fault", f"{world} ranks", f"{name}, all have ended", ended)
        report.add("fault", f"{world} ranks", f"{name}, next useful step", useful)
        table.add_row(name, f"{ended.median:.2f}", f"{useful.median:.2f}")
    return table


def _tokenized(folder: Path) -> Path:
    """Tokens of Python's own library: 400 words, sequences of 64."""
    library = Path(json.__file__).parent.parent
    split = ["--include", "*.py", "--vocab-size", "400", "--sequence-length", "64", "--heldout-fraction", "0.05"]
    command = [
        sys.executable,
        "-m",
        "megadistill",
        "tokenize",
        str(library / "asyncio"),
        str(library / "email"),
        *split,
    ]
    done = subprocess.run([*command, "--output", str(folder / "data")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / "data"


def _arguments() -> argparse.Namespace:
    options = parser("scale", __doc__, HELP, QUESTIONS)
    options.set_defaults(repeats=3)
    worlds = [2, 4, 8, 16, 32]
    options.add_argument(
        "--worlds", nargs="+", type=int, default=worlds, help="numbers of ranks, even (default: 2 to 32)"
    )
    options.add_argument("--fault-world", type=int, default=4, help="ranks of fault (default %(default)s)")
    options.add_argument("--package", type=Path, default=ROOT, help="checkout that is measured (default: this one)")
    options.add_argument("--folder", type=Path, help="keep runs and logs in this new folder")
    return options.parse_args()


def main() -> None:
    arguments = _arguments()
    report = Report(threads=1, repeats=arguments.repeats, measured=MEASURED)
    report.print_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if arguments.folder is None else arguments.folder
        folder.mkdir(parents=True, exist_ok=True)
        data, package = _tokenized(folder), arguments.package.resolve()
        if "growth" in arguments.only:
            report.console.print(growth(folder, data, package, arguments.worlds, report))
        if "fault" in arguments.only:
            report.console.print(fault(folder, data, package, arguments.fault_world, report))
    if not arguments.no_csv:
        report.append_to(arguments.csv)


if __name__ == "__main__":
    main()
