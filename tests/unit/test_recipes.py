"""The recipes of the repository: each one loads, and those at scale pass the checks before a run.

The checks run with the published configs, data that is only described, and no weights.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from megadistill.accelerators import accelerator
from megadistill.config.load import load_recipe
from megadistill.config.recipe import Recipe
from megadistill.data import Manifest
from megadistill.distributed.launch import Launch
from megadistill.models.families import load_config
from megadistill.models.flops import parameter_counts
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.latency import micro_step_latency
from megadistill.plan.layouts import Cluster, place
from megadistill.plan.plan_input import read_plan_input
from megadistill.plan.throughput import MfuAssumption
from megadistill.shipped import shipped_folder
from megadistill.student.deepspeed_config import deepspeed_path
from megadistill.train.setup.setup import prepare
from tests.paths import RECIPES, ROOT
from tests.unit.train.cases import TOKENIZER, described_data

MODELS = RECIPES / "models"
SEQUENCE, GPUS_PER_NODE = 8192, 8
MARGIN = 0.8
"""Usable fraction of memory: the rest is for the driver's context, NCCL's buffers and the allocator's gaps."""

SPECIALISTS = RECIPES / "llama3-70b-to-8b" / "specialists.yaml"
AT_SCALE = sorted([*RECIPES.glob("*/*-nodes.yaml"), SPECIALISTS])

PUBLISHED = {
    "gemma-2-2b": 2.61e9,
    "gemma-2-9b": 9.24e9,
    "gemma-2-27b": 27.2e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.1-minitron-4b-width": 4.51e9,
}
"""Parameters, by the models' own cards."""

TEACHERS = {
    "models/gemma-2-27b": "gemma-2-27b",
    "models/llama-3.1-70b": "llama-3.1-70b",
    "models/llama-3.1-70b-code": "llama-3.1-70b",
    "models/llama-3.1-8b-corrected": "llama-3.1-8b",
}
"""A teacher's path in a recipe -> its config here."""


def _name(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's paths are relative to where one starts."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", [path for path in RECIPES.rglob("*.yaml") if "base" not in path.stem], ids=_name)
def test_a_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path, ["run.folder=runs/x"])  # those of results have none of their own
    if isinstance(recipe.student.config, dict) or Path(recipe.student.config).is_relative_to("recipes"):
        source = recipe.student.config
        load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    assert deepspeed_path(recipe.student.deepspeed, on_gpus=True).is_relative_to(shipped_folder("ds_configs"))


@pytest.mark.parametrize("folder", sorted(MODELS.iterdir()), ids=lambda folder: folder.name)
def test_a_config_is_the_published_model(folder: Path) -> None:
    counted = parameter_counts(load_config(folder, what="test")).total
    assert counted == pytest.approx(PUBLISHED[folder.name], rel=0.01)


def _nodes(path: Path) -> int:
    return 8 if path == SPECIALISTS else int(path.stem.removesuffix("-nodes"))


def _teachers(recipe: Recipe) -> dict[str, Path]:
    """Key of each teacher's path -> the folder of its config here."""
    sections = recipe.teacher_sections.items()
    return {f"{key}.path": MODELS / TEACHERS[str(section.path)] for key, section in sections}


def _described(recipe: Recipe, folder: Path) -> list[str]:
    """Overrides that put described data, and a teacher's config, where the recipe has the real ones."""
    student = load_config(Path(str(recipe.student.config)), what="test")
    plain = Manifest.load(described_data(folder / "plain"))
    changes = {"sequence_length": SEQUENCE, "vocab_size": student.vocab_size, "dtype": "uint32"}
    (folder / "data").mkdir()
    Manifest.model_validate_json(json.dumps(plain.model_dump(mode="json") | changes)).write(folder / "data")
    manifest = folder / "data" / "manifest.json"
    sources = [f"sources.{name}" for name in recipe.data.sources] or ["manifest"]
    overrides = [f"data.{name}={manifest}" for name in sources]
    for key, model in _teachers(recipe).items():
        teacher = folder / key
        teacher.mkdir()
        (teacher / "config.json").write_bytes((model / "config.json").read_bytes())
        (teacher / "tokenizer.model").write_bytes(TOKENIZER)
        overrides.append(f"{key}={teacher}")
    if recipe.validation is not None:
        overrides.append("validation=null")
    if recipe.student.weights is not None:
        overrides.append(f"student.weights={recipe.student.config}")
    return [*overrides, f"run.folder={folder / 'run'}", "loss.elementwise=eager"]


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadistill.train.setup.setup.check_weights", lambda *folder_and_config: None)
    monkeypatch.setattr("megadistill.train.setup.setup.check_start", lambda *folder_config_data: None)
    monkeypatch.setattr("megadistill.train.setup.setup.sampled_fingerprint", lambda folder: "of no weights")


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("path", AT_SCALE, ids=_name)
def test_a_recipe_at_scale_starts_and_fits_on_its_nodes(path: Path, tmp_path: Path) -> None:
    plain, ranks = load_recipe(path), _nodes(path) * GPUS_PER_NODE
    overrides = _described(plain, tmp_path)
    for rank in (0, ranks - 1):
        setup = prepare(load_recipe(path, overrides), Launch(rank, ranks, rank % GPUS_PER_NODE, GPUS_PER_NODE))
    assert 4e6 <= setup.shapes[0].tokens <= 17e6
    assert plain.checkpoint.keep_every is not None
    assert plain.checkpoint.keep_every % plain.train.checkpoint_every == 0
    assert plain.train.steps % plain.checkpoint.keep_every == 0, "the last checkpoint is one that is kept"
    planned = _planned(path)
    assert planned.sharding.roles == setup.roles
    assert planned.memory < MARGIN * planned.cluster.accelerator.memory_bytes


@cache
def _planned(path: Path) -> Estimate:
    """The estimate of `megadistill plan` for the recipe."""
    recipe = load_recipe(path)
    overrides = [f"{key}={model}" for key, model in _teachers(recipe).items()]
    inputs = read_plan_input(path, overrides, sequence_length=SEQUENCE)
    cluster = Cluster(_nodes(path), GPUS_PER_NODE, accelerator("h100"))
    return estimate(place(recipe, inputs, cluster), cluster, MfuAssumption())


@pytest.mark.parametrize("path", AT_SCALE, ids=_name)
def test_a_recipe_at_scale_is_no_toy(path: Path) -> None:
    """So `plan` forecasts its days: launches of kernels are a small part of its micro-step."""
    planned = _planned(path)
    assert micro_step_latency(planned.sharding) < 0.1 * planned.times.micro_step
    assert not planned.latency_bound


UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "": 1.0}


def _number(text: str) -> float:
    value, unit = re.fullmatch(r"([\d.,]+) ?([kMBT]?)(?: GB)?", text).groups()  # type: ignore[union-attr]
    return float(value.replace(",", "")) * UNITS[unit]


@pytest.mark.parametrize("path", AT_SCALE, ids=_name)
def test_the_page_has_the_numbers_of_plan(path: Path) -> None:
    """To a tenth, memory to a fifth: a refined plan is no reason to rewrite the page."""
    rows = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if row.startswith("|") and f"(../{path.relative_to(ROOT)})" in row]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    _, teacher, batch, tokens, memory, rate, _, hours, optimistic_rate, _, optimistic_hours = cells
    planned = _planned(path)
    recipe = planned.sharding.recipe
    if recipe.teacher is None or recipe.teacher.ranks is None:
        assert teacher == f"colocated, {planned.sharding.stages} stages"
    else:
        assert teacher == f"{recipe.teacher.ranks:,} GPUs, {recipe.teacher.stages} stages"
    for text, counted in (
        (batch, recipe.train.global_batch * SEQUENCE),
        (tokens, planned.requirements.tokens),
        (rate, planned.tokens_per_second),
        (hours, planned.gpu_hours),
        (optimistic_rate, planned.optimistic.tokens_per_second),
        (optimistic_hours, planned.optimistic.gpu_hours),
    ):
        assert _number(text) == pytest.approx(counted, rel=0.1)
    assert 1e9 * _number(memory) == pytest.approx(planned.memory, rel=0.2)


@pytest.mark.parametrize("path", AT_SCALE, ids=_name)
def test_a_recipe_says_how_it_is_planned_and_started(path: Path) -> None:
    recipe, nodes = load_recipe(path), _nodes(path)
    head = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    head = head.replace("\\ ", " ")
    plan = f"megadistill plan {path.relative_to(ROOT)} --nodes {nodes} --gpus-per-node {GPUS_PER_NODE} --gpu h100"
    assert " ".join(head.split()).count(plan) == 1
    for key, model in _teachers(recipe).items():
        option = "--teacher-config " if recipe.teacher is not None else f"--set {key}="
        assert f"{option}{model.relative_to(ROOT)}" in head
    own = recipe.teacher is not None and recipe.teacher.placement == "disaggregated"
    script = "train-disaggregated" if own else "train"
    started = re.search(rf"sbatch --nodes=(\d+) slurm/{script}\.sbatch .*SPARES=(\d+)", head)
    assert started is not None
    assert int(started[1]) - int(started[2]) == nodes
    if recipe.teacher is not None and recipe.teacher.ranks is not None:
        assert f"TEACHER_NODES={recipe.teacher.ranks // GPUS_PER_NODE}" in head
        assert recipe.teacher.ranks % GPUS_PER_NODE == 0
