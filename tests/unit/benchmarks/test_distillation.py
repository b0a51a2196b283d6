"""The driver of `make results`: fair rows, no stale ones, and a page that is written from a whole table alone."""

import json
import os
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import distillation, jobs
from benchmarks.distillation import FOLDER, MORE_ROWS, RECIPES, ROWS, SEEDS, Place
from benchmarks.distillation_page import MEASURES, Key, Results, Row
from benchmarks.jobs import Job, Step
from megadistill.config.load import dotted, load_recipe
from megadistill.errors import UserError
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)


def settings(job: Job) -> list[str]:
    train = job.steps[0].command
    return [after for word, after in pairwise(train) if word == "--set"]


ALL_ROWS = (*ROWS, *MORE_ROWS)


def test_every_recipe_is_a_row() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"base", "teacher", *(row.name for row in ALL_ROWS)}


def test_rows_of_a_seed_differ_in_the_training_target_alone() -> None:
    """The same initialisation, tokens, schedule and learning rate: only the loss, and for labels the teacher."""
    resolved = {}
    for row in ALL_ROWS:
        job = distillation.student_job(Place(FOLDER), row, 2)
        resolved[row.name] = dotted(load_recipe(RECIPES / f"{row.name}.yaml", settings(job)).snapshot())
    full = resolved["full-kl"]
    assert full["run.seed"] == full["data.seed"] == 2
    assert full["data.manifest"] == str(Place(FOLDER).train)
    assert full["teacher.path"] == str(Place(FOLDER).teacher)
    for name, keys in resolved.items():
        differing = {key for key in full.keys() | keys.keys() if full.get(key) != keys.get(key)} - {"run.folder"}
        targets = {key for key in differing if key.startswith(("loss.", "teacher.")) or key in ("loss", "teacher")}
        assert differing - targets == ({"objective"} if name == "labels" else set())
        assert targets or name == "full-kl"


def test_no_student_reads_in_the_order_of_its_teacher() -> None:
    assert load_recipe(RECIPES / "teacher.yaml", ["run.folder=x"]).data.seed not in SEEDS


def test_the_first_seed_of_every_row_comes_before_the_other_seeds_of_the_main_rows() -> None:
    main, other = Row("a", "a", main=True), Row("b", "b")
    assert distillation.rounds([main, other]) == ([(main, 1), (other, 1)], [(main, 2), (main, 3)])


def test_a_run_of_another_recipe_is_refused_with_the_way_out(tmp_path: Path) -> None:
    place, row = Place(tmp_path), ROWS[0]
    job = distillation.student_job(place, row, 1)
    recipe = load_recipe(RECIPES / f"{row.name}.yaml", settings(job)).snapshot()
    place.run(row, 1).mkdir()
    written = place.run(row, 1) / "recipe.json"
    written.write_text(json.dumps({"recipe": recipe}))
    distillation.refuse_stale(place, ROWS)
    recipe["train"]["optimizer"]["learning_rate"] = 1.0
    written.write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(UserError, match=r"learning_rate was 1\.0.*remove .*labels-1"):
        distillation.refuse_stale(place, ROWS)


def test_a_student_of_an_earlier_teacher_is_refused(tmp_path: Path) -> None:
    place, row = Place(tmp_path), ROWS[1]
    evaluation, teacher = place.evaluation(row, 1), place.teacher / "config.json"
    for path in (evaluation, teacher):
        path.parent.mkdir()
        path.touch()
    os.utime(teacher, (1000, 1000))
    os.utime(evaluation, (2000, 2000))
    distillation.refuse_stale(place, ROWS)
    os.utime(teacher, (3000, 3000))
    with pytest.raises(UserError, match="of an earlier teacher"):
        distillation.refuse_stale(place, ROWS)


def test_how_far_a_run_is_is_read_from_its_last_whole_step(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "labels.yaml", ["run.folder=x", "train.steps=400"])
    assert distillation.trained_fraction(tmp_path, recipe) == 0.0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "pad": "x" * 500}) + "\n" for step in range(1, 201)))
    assert distillation.trained_fraction(tmp_path, recipe) == pytest.approx(0.5 * 0.95)
    metrics.write_text('{"step": 1}\n{"st')
    assert distillation.trained_fraction(tmp_path, recipe) == 0.0


class Invented:
    """`results` with commands that write what an evaluation would, or fail; and no page."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.failing: set[str] = set()
        self.measured: list[list[str]] = []
        self.pages: list[dict[str, float]] = []
        monkeypatch.setattr(distillation, "ROWS", (Row("labels", "labels", main=True), Row("full-kl", "full KL")))
        monkeypatch.setattr(distillation, "refuse_stale", lambda place, rows: None)
        for name in ("tokenize_job", "teacher_job"):
            monkeypatch.setattr(distillation, name, lambda place, name=name: self.job(name, folder / name))
        monkeypatch.setattr(
            distillation,
            "student_job",
            lambda place, row, seed: self.job(f"{row.name}-{seed}", place.exported(row, seed)),
        )
        monkeypatch.setattr(distillation, "measure_job", self.measure)
        monkeypatch.setattr(distillation, "draw", lambda results, folders, to: None)
        monkeypatch.setattr(distillation, "write_page", self.page)

    def job(self, name: str, product: Path, text: str = "") -> Job:
        script = f"mkdir -p {product.parent} && echo '{text}' > {product}"
        command = ("sh", "-c", "echo no luck; exit 4" if name in self.failing else script)
        return Job(name, (Step(command, product),), self.folder / f"{name}.log", 1.0, lambda: 0.0)

    def page(self, results: Results, folders: dict[Key, Path]) -> None:
        assert results.teacher["cross_entropy"] == 1.0
        self.pages.append({folders[key].name: student["cross_entropy"] for key, student in results.students.items()})

    def measure(self, place: Place, keys: list[Key]) -> Job:
        """A student's cross-entropy tells which it is."""
        self.measured.append([f"{row.name}-{seed}" for row, seed in keys])
        of_students = [self.evaluation(2.0 if row.name == "full-kl" else 3.0 + seed) for row, seed in keys]
        return self.job("measure", place.round, json.dumps([self.evaluation(1.0), *of_students]))

    def evaluation(self, cross_entropy: float) -> dict[str, float]:
        return {**dict.fromkeys(MEASURES, 1.0), "cross_entropy": cross_entropy}

    def results(self) -> tuple[int, str]:
        console = Console(file=StringIO(), width=80)
        code = distillation.results(Place(self.folder), console)
        assert isinstance(console.file, StringIO)
        return code, console.file.getvalue()


def test_a_failed_run_is_reported_and_leaves_the_page_until_it_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invented = Invented(tmp_path, monkeypatch)
    invented.failing = {"labels-2"}
    code, printed = invented.results()
    assert code == 1
    assert invented.pages == []
    assert "labels-2: FAILED" in printed
    assert "no luck" in printed
    assert "labels-3: done" in printed, "the others go on"
    assert invented.measured == [["labels-1", "full-kl-1"], ["labels-3"]]
    invented.failing = set()
    code, printed = invented.results()
    assert code == 0
    assert invented.pages == [{"labels-1": 4.0, "full-kl-1": 2.0, "labels-2": 5.0, "labels-3": 6.0}]
    assert "labels-2: done" in printed
    assert "labels-3: done" not in printed, "what is finished is not done again"
    assert invented.measured[2:] == [["labels-2"]], "nor measured again"


def test_a_failed_measurement_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invented = Invented(tmp_path, monkeypatch)
    invented.failing = {"measure"}
    code, printed = invented.results()
    assert (code, invented.pages) == (1, [])
    assert printed.count("measure: FAILED") == 4, "as they happen, and at the end"
    invented.failing = set()
    assert invented.results()[0] == 0
    assert len(invented.pages[0]) == 4


def test_without_a_teacher_no_student_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invented = Invented(tmp_path, monkeypatch)
    invented.failing = {"teacher_job"}
    code, printed = invented.results()
    assert code == 1
    assert "teacher_job: FAILED" in printed
    assert "labels-1" not in printed
