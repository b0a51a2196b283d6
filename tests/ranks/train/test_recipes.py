"""Each pair of teacher and student at scale, tiny_config, trains for a few steps on real ranks.

Architectures, precision aside, loss, padding, placement and DeepSpeed's file are the recipe's; sizes, data and steps
are small.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.load import load_recipe
from megadistill.config.recipe import Recipe
from megadistill.data import Manifest
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.doctor.tiny import tiny_config, write_random
from megadistill.models.families import load_config
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import run_teacher_server
from tests.corpora import small_data_set
from tests.paths import RECIPES, ROOT
from tests.ranks.harness import run_ranks

STEPS = 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of four units: every step reads all of them, so that the loss of one can be compared with the next."""
    folder = tmp_path_factory.mktemp("data")
    data = small_data_set(folder, sequence_length=32, heldout_fraction=0.0, documents=8, repeats=1)
    return data / "train" / "manifest.json"


def _small(recipe: Recipe, manifest: Path, folder: Path) -> list[str]:
    """Overrides: small models in `folder`, its data, a few steps; what a recipe says of everything else stays."""
    units, vocab = Manifest.load(manifest).sequences, Manifest.load(manifest).vocab_size
    assert recipe.teacher is not None
    write_random(_tiny(Path(str(recipe.student.config)), vocab), _made(folder / "student"), seed=1)
    assert recipe.teacher.path is not None
    published = RECIPES / "models" / Path(recipe.teacher.path).name.removesuffix("-corrected")
    teacher = _tiny(published, vocab)
    teacher.initializer_range = 0.2  # it has something to say
    write_random(teacher, _made(folder / "teacher"), seed=2)
    for file in (manifest.parent.parent / "tokenizer").iterdir():
        shutil.copyfile(file, folder / "teacher" / file.name)
    return [
        f"run.folder={folder / 'run'}",
        *[f"data.{name}={manifest}" for name in [f"sources.{name}" for name in recipe.data.sources] or ["manifest"]],
        f"student.config={folder / 'student'}",
        *([f"student.weights={folder / 'student'}"] if recipe.student.weights else []),
        f"teacher.path={folder / 'teacher'}",
        "distributed.vocab_group=2",
        "distributed.shard=2",
        "loss.elementwise=eager",  # compiling takes longer than all of these tests
        "loss.diagnostics_every=2",
        *(["loss.schedule.warmup_steps=1", "loss.schedule.decay_steps=1"] if recipe.loss.schedule else []),
        f"train.steps={STEPS}",
        f"train.global_batch={units}",
        "train.micro_batch=1",
        "train.precision=float32",
        "train.optimizer.learning_rate=5e-3",
        "train.schedule.warmup_steps=1",
        *(["train.schedule.decay_steps=1"] if recipe.train.schedule.kind == "wsd" else []),
        f"train.checkpoint_every={STEPS}",
        "checkpoint.keep_every=0",
    ]


def _tiny(folder: Path, vocab_size: int) -> Any:
    """Narrower than a dry run's, with two layers: heads keep their width."""
    config = tiny_config(load_config(folder, what="test"), vocab_size=vocab_size, min_layers=2)
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    config.hidden_size = config.intermediate_size = 128
    return config


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _train(topology: Topology, path: str, overrides: list[str]) -> None:
    recipe = load_recipe(Path(path), overrides)
    assert recipe.teacher is not None
    apart = recipe.teacher.ranks or 0
    rank = topology.rank + (topology.world if topology.role == "teacher" else 0)
    setup = prepare(recipe, Launch(rank, 2 + apart, rank, 2 + apart))
    if topology.role == "teacher":
        run_teacher_server(setup, topology)
    else:
        run(setup, topology, stop_after=None)


@pytest.mark.parametrize(
    "name",
    [
        "gemma2-27b-to-2b/512-nodes",
        "gemma2-27b-to-9b/64-nodes",
        "llama3-70b-to-8b/8-nodes",
        "llama3-8b-to-4b-pruned/8-nodes",
    ],
)
def test_a_shrunken_pair_trains(name: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path)
    assert recipe.teacher is not None
    overrides = _small(recipe, manifest, tmp_path)
    roles = None
    if recipe.teacher.placement == "disaggregated":
        roles = Roles(3, 1, 1)
        # hpZ's copies lie on the eight ranks of a node; tests/ranks/student/test_deepspeed_configs.py has it on two
        overrides += ["teacher.ranks=1", "teacher.stages=1", "student.deepspeed=zero3"]
    run_ranks(2 if roles is None else roles.world, _train, str(path), overrides, vocab_group=2, roles=roles)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == STEPS
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert steps[-1]["kl"] < 0.95 * steps[0]["kl"], [step["kl"] for step in steps]
