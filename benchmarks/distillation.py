"""Comparison of training targets: trains and evaluates a student for each, and writes the page of results.

python -m benchmarks.distillation      (`make results`)
"""

import argparse
import json
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from benchmarks.distillation_page import PAGE, SEQUENCE, Key, Row, read_results, result_table, write_page
from benchmarks.distillation_plots import draw
from benchmarks.jobs import Ended, Job, Pace, Step, run
from megadistill.config.load import load_recipe
from megadistill.config.recipe import Recipe
from megadistill.errors import RestartFault, UserError
from megadistill.shipped import shipped_folder
from megadistill.train.setup.run_folder import refuse_other_recipe

RECIPES = shipped_folder("recipes") / "results"
FOLDER = Path("runs/results")
SEEDS = (1, 2, 3)
MEASURE_SECONDS = 25.0
"""Estimated seconds of one core to evaluate a model on the held-out text."""
LINE_SECONDS = 60.0
"""Time between plain lines where there is no terminal."""

HELP = """\
A teacher is pretrained on this Python's standard library, then the same student learns the same tokens from the
target of each recipe in recipes/results. Finished runs in runs/results are not repeated, and a stopped run resumes
from its checkpoint; remove the folder to start again. At the end: the table, its CSV file, and
docs/results/distillation.md with its figures."""

ROWS = (
    Row("labels", "labels only (from scratch)", main=True),
    Row("full-kl", "full forward KL", main=True),
    Row("sampled-50", "sampled counts, N = 50", main=True),
    Row("sampled-16", "sampled counts, N = 16"),
    Row("kl-ce", "0.7 KL + 0.3 CE", main=True),
    Row("top-50-other", "top-50 + other"),
    Row("top-12-other", "top-12 + other", main=True),
    Row("top-12-other-ce", "0.7 (top-12 + other) + 0.3 CE"),
    Row("top-p-50", "top-p 0.95 of at most 50, renormalised"),
    Row("top-50-renormalised", "top-50 renormalised"),
    Row("top-12-renormalised", "top-12 renormalised"),
    Row("jsd", "Jensen-Shannon divergence"),
    Row("reverse-kl", "reverse KL", main=True),
    Row("top-1", "teacher's top-1"),
)
"""The rows of the page."""

MORE_ROWS = (
    Row("distinct-256", "256 distinct sampled ids, renormalised"),
    Row("distinct-64", "64 distinct sampled ids, renormalised"),
)
"""Rows that `--only` can name beside those of the page."""


@dataclass(frozen=True)
class Place:
    """The folder of `make results`."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "data/train/manifest.json"

    @property
    def heldout(self) -> Path:
        return self.folder / "data/heldout/manifest.json"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher-hf"

    def run(self, row: Row, seed: int) -> Path:
        return self.folder / f"{row.name}-{seed}"

    def exported(self, row: Row, seed: int) -> Path:
        return self.folder / f"{row.name}-{seed}-hf"

    def evaluation(self, row: Row, seed: int) -> Path:
        return self.folder / "evaluations" / f"{row.name}-{seed}.json"

    @property
    def round(self) -> Path:
        """The results of one call of `evaluate`, before they are split into files."""
        return self.folder / "evaluations/round.json"


def rounds(rows: Sequence[Row]) -> tuple[list[Key], list[Key]]:
    """Every row with the first seed, then the main rows with the others: a table is there as early as can be."""
    first, *others = SEEDS
    return [(row, first) for row in rows], [(row, seed) for seed in others for row in rows if row.main]


def runs(rows: Sequence[Row]) -> list[Key]:
    return [key for keys in rounds(rows) for key in keys]


def tokenize_job(place: Place) -> Job:
    data = place.folder / "data"
    command = (
        *("tokenize", sysconfig.get_paths()["stdlib"], "--include", "*.py", "--exclude", "site-packages/*"),
        *("--vocab-size", "2048", "--sequence-length", str(SEQUENCE)),
        *("--heldout-fraction", "0.02", "--output", str(data)),
    )
    log = place.folder / "logs/tokenize.log"
    return Job("the text, tokenized", (megadistill_step(command, place.heldout),), log, weight=60, fraction=lambda: 0.0)


def teacher_job(place: Place) -> Job:
    """Trains on two ranks: nothing else can run before there is a teacher."""
    folder = place.folder / "teacher"
    recipe, settings = _recipe("teacher", folder, seed=None)
    train = (*_ranks(2), "train", str(RECIPES / "teacher.yaml"), *_set(settings))
    steps = (
        Step(train, folder / f"checkpoints/step-{recipe.train.steps:08d}"),
        megadistill_step(("export", str(folder), "--output", str(place.teacher)), place.teacher / "config.json"),
    )
    log = place.folder / "logs/teacher.log"
    return Job("the teacher", steps, log, weight=800, fraction=lambda: trained_fraction(folder, recipe))


def student_job(place: Place, row: Row, seed: int) -> Job:
    folder = place.run(row, seed)
    recipe, settings = _recipe(row.name, folder, seed=seed)
    exported = place.exported(row, seed)
    steps = (
        megadistill_step(
            ("train", str(RECIPES / f"{row.name}.yaml"), *_set(settings)),
            folder / f"checkpoints/step-{recipe.train.steps:08d}",
        ),
        megadistill_step(("export", str(folder), "--output", str(exported)), exported / "config.json"),
    )
    return Job(
        f"{row.name}, seed {seed}",
        steps,
        place.folder / f"logs/{folder.name}.log",
        weight=50 if recipe.objective == "labels" else 80,
        fraction=lambda: trained_fraction(folder, recipe),
    )


def measure_job(place: Place, keys: Sequence[Key]) -> Job:
    """Evaluates many students in one call: the teacher reads the held-out text once for all of them."""
    models = [str(place.exported(row, seed)) for row, seed in keys]
    what = ("--teacher", str(place.teacher), "--data", str(place.heldout), "--json", str(place.round))
    step = Step((*_ranks(cores()), "evaluate", *models, *what), place.round)
    weight = MEASURE_SECONDS * len(models)
    return Job(f"{len(models)} measured", (step,), place.folder / "logs/evaluate.log", weight, fraction=lambda: 0.0)


def measurement(place: Place, key: Key) -> Job:
    """One student's part of `measure_job`, for the estimate of the time left: it is never run."""
    step = Step((), place.evaluation(*key))
    return Job("measurement", (step,), place.folder / "logs/evaluate.log", MEASURE_SECONDS, fraction=lambda: 0.0)


def share_out(place: Place, keys: Sequence[Key]) -> None:
    """Splits the results into a file for each student, with the teacher: existing ones are not measured again."""
    teacher, *students = json.loads(place.round.read_text(encoding="utf-8"))
    for (row, seed), student in zip(keys, students, strict=True):
        place.evaluation(row, seed).write_text(json.dumps([teacher, student], indent=1) + "\n", encoding="utf-8")
    place.round.unlink()


def refuse_stale(place: Place, rows: Sequence[Row]) -> None:
    """Checks that the folder's runs are of today's recipes, and of its teacher.

    Raises:
        UserError: a run's recipe has changed since, or its student is older than the teacher.
    """
    started = [("teacher", place.folder / "teacher", None), *((r.name, place.run(r, s), s) for r, s in runs(rows))]
    for name, folder, seed in started:
        if not folder.exists():
            continue
        try:
            refuse_other_recipe(folder, _recipe(name, folder, seed=seed)[0].snapshot())
        except UserError as error:
            raise UserError(f"{error}. Or remove {folder}*, which `make results` then makes again") from None
    teacher = place.teacher / "config.json"
    for row, seed in runs(rows):
        for made in (place.exported(row, seed) / "config.json", place.evaluation(row, seed)):
            if made.exists() and (not teacher.exists() or made.stat().st_mtime < teacher.stat().st_mtime):
                raise UserError(f"{made} is of an earlier teacher: remove {place.folder} to start afresh")


def _recipe(name: str, folder: Path, *, seed: int | None) -> tuple[Recipe, list[str]]:
    """A recipe, and the settings of `--set` that make it of its file."""
    settings = [f"run.folder={folder}"]
    if seed is not None:
        settings += [f"run.seed={seed}", f"data.seed={seed}"]
    return load_recipe(RECIPES / f"{name}.yaml", settings), settings


def _set(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def megadistill_step(arguments: Sequence[str], product: Path) -> Step:
    return Step((sys.executable, "-m", "megadistill", *arguments), product)


def _ranks(count: int) -> tuple[str, ...]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    return (*launcher, "-m", "megadistill")


def trained_fraction(folder: Path, recipe: Recipe) -> float:
    """Fraction of a run's steps that are taken, of 0.95: the rest is exporting."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
        return float(json.loads(last)["step"]) / recipe.train.steps * 0.95
    except (OSError, ValueError, KeyError):  # none yet, or half a line
        return 0.0


def follow(jobs: Sequence[Job], *, side_by_side: int, pace: Pace, console: Console) -> list[Ended]:
    """Runs the jobs with a progress bar on a terminal and lines elsewhere. Returns those that failed."""
    failed = []
    printed = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    with (
        closing(run(jobs, side_by_side=side_by_side)) as events,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars,
    ):
        bar = bars.add_task("results", total=pace.total, left="")
        for ended in events:
            bars.update(bar, completed=pace.done, left=pace.left())
            if ended is not None and ended.failure is not None:
                failed.append(ended)
            if ended is not None or (not console.is_terminal and time.monotonic() - printed > LINE_SECONDS):
                printed = time.monotonic()
                console.print(_line(ended, pace), highlight=False, soft_wrap=True, markup=False)
    return failed


def _line(ended: Ended | None, pace: Pace) -> str:
    far = ", ".join(part for part in (f"{pace.done / pace.total:.0%} of all", pace.left()) if part)
    if ended is None:
        return far
    if ended.failure is not None:
        return f"{ended.job.name}: FAILED: {ended.failure}"
    return f"{ended.job.name}: done in {ended.seconds:.0f} s; {far}"


def results(place: Place, console: Console, only: Sequence[Row] = ()) -> int:
    """Runs all unfinished jobs, prints the table and, once all are done, writes the page. Returns an exit code.

    With `only`, these rows with the first seed, and no page.
    """
    turns = ([(row, SEEDS[0]) for row in only],) if only else rounds(ROWS)
    refuse_stale(place, only or ROWS)
    first = [tokenize_job(place), teacher_job(place)]
    students = {key: student_job(place, *key) for keys in turns for key in keys}
    pace = Pace([*first, *students.values(), *(measurement(place, key) for key in students)])
    for job in first:
        if follow([job], side_by_side=1, pace=pace, console=console):
            return 1
    failed: list[Ended] = []
    for keys in turns:
        failed += follow([students[key] for key in keys], side_by_side=cores(), pace=pace, console=console)
        new = [key for key in keys if students[key].done and not place.evaluation(*key).exists()]
        if new:
            place.round.unlink(missing_ok=True)
            failed += follow([measure_job(place, new)], side_by_side=1, pace=pace, console=console)
        if place.round.exists():
            share_out(place, new)
            if not only and len(_measured(place, students)) < len(students):
                console.print(result_table(read_results(_measured(place, students))))
    for ended in failed:
        console.print(_line(ended, pace), highlight=False, soft_wrap=True, markup=False)
    if failed:
        console.print("the page is left as it is; the same command tries the failed runs again", highlight=False)
        return 1
    measured = read_results(_measured(place, students))
    if only:
        console.print(result_table(measured))
        return 0
    folders = {key: place.run(*key) for key in measured.students}
    draw(measured, folders, PAGE.parent)
    write_page(measured, folders)
    console.print(result_table(measured))
    return 0


def _measured(place: Place, keys: Iterable[Key]) -> dict[Key, Path]:
    return {key: place.evaluation(*key) for key in keys if place.evaluation(*key).exists()}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    by_name = {row.name: row for row in (*ROWS, *MORE_ROWS)}
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--only", nargs="+", choices=by_name, default=(), help="these, with seed 1; prints the table")
    only = [by_name[name] for name in options.parse_args().only]
    os.environ["OMP_NUM_THREADS"] = "1"  # a run a core
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(results(Place(FOLDER), Console(), only))
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(RestartFault.exit_code)
    except UserError as error:
        print(f"results: {error}", file=sys.stderr)
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
