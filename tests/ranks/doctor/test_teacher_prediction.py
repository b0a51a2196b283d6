"""Whether the doctor tells a teacher of the shards' ids from one of other ids, and a run and `store-targets` say so."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.config.recipe import Recipe
from megadistill.data import Manifest, TokenStream
from megadistill.data.tokenizers.data_files import read_files
from megadistill.datagen.store_targets import store_on_ranks
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.doctor.rank_report import Row
from megadistill.doctor.teacher_prediction import CHECK, teacher_rows
from megadistill.models.families import EMBEDDING, HEAD, load_config
from megadistill.train.loop import run
from megadistill.train.setup.setup import Setup, prepare
from tests.ranks.harness import run_ranks
from tests.ranks.train import test_loop as loops

manifest = loops.manifest  # the fixture
WIDTH = 48


def _teacher(folder: Path, manifest: Path, log_odds_V: Tensor) -> Path:
    """A teacher that predicts the same distribution everywhere, whatever it reads."""
    described = Manifest.load(manifest)
    config = {**loops.STUDENT, "hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": described.vocab_size}
    model = AutoModelForCausalLM.from_config(load_config(config, what="test"))
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    state[EMBEDDING].fill_(1.0)
    state[HEAD].copy_(log_odds_V[:, None].expand(-1, WIDTH) / WIDTH)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(read_files(described)["tokenizer.model"])
    return folder


@pytest.fixture(scope="module")
def teachers(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that knows how frequent each id is; the same with other ids; one that knows nothing."""
    described = Manifest.load(manifest)
    stream = TokenStream(described, seed=1, batch_slots=1, rank=0, world_size=1)
    labels = stream.batch(range(described.sequences)).labels.flatten()
    frequent = torch.bincount(labels, minlength=described.vocab_size).float().add(0.01).log()
    folder = tmp_path_factory.mktemp("teachers")
    given = {"own": frequent, "other": frequent.roll(100), "untrained": -frequent / 100}
    return {name: _teacher(folder / name, manifest, log_odds_V) for name, log_odds_V in given.items()}


def _setup(topology: Topology, manifest: str, folder: str, teacher: str, changes: dict[str, object]) -> Setup:
    base = loops.recipe(Path(manifest), Path(folder)).snapshot()
    train = {**base["train"], "steps": 1, "micro_batch": loops.BATCH // topology.world}
    values = {**base, "objective": "distill", "teacher": {"path": teacher}, "train": train, **changes}
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return prepare(Recipe.model_validate(values), launch)


def _rows(topology: Topology, manifest: str, folder: str, teachers: list[str]) -> list[Row | None]:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    labels = _setup(topology, manifest, folder, teachers[0], {"objective": "labels", "teacher": None})
    setups = [labels, *(_setup(topology, manifest, folder, teacher, {}) for teacher in teachers)]
    return [next(iter(teacher_rows(setup, topology, launch)), None) for setup in setups]


def test_a_teacher_of_other_ids_fails_and_one_that_knows_nothing_is_a_warning(
    manifest: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    paths = [str(path) for path in teachers.values()]
    first, second = run_ranks(2, _rows, str(manifest), str(tmp_path / "run"), paths)
    assert first == second, "each rank holds a stage, and half of the vocabulary"
    labels, own, other, untrained = first
    assert labels is None
    assert [(row.check, row.status.name) for row in (own, other, untrained)] == [
        (CHECK, "OK"),
        (CHECK, "FAIL"),
        (CHECK, "WARN"),
    ]
    uniform = f"{math.log(Manifest.load(manifest).vocab_size):.2f}"
    assert f"nats on 63 tokens of the data; a uniform guess has {uniform}" in own.detail
    for part in ("worse than", uniform, "its ids are not those of the shards", "tokenize ... --tokenizer"):
        assert part in other.detail
    assert not (tmp_path / "run").exists()


def _train_and_store(topology: Topology, manifest: str, folder: str, teacher: str) -> list[str]:
    """Warnings of `store-targets`."""
    run(_setup(topology, manifest, f"{folder}/run", teacher, {}), topology, stop_after=None)
    section = {"path": teacher, "save_targets": f"{folder}/targets"}
    loss = {"targets": {"select": "top_k", "k": 8}}
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megadistill.datagen.store_targets")
    logger.addHandler(handler)
    store_on_ranks(
        _setup(topology, manifest, f"{folder}/no-run", teacher, {"teacher": section, "loss": loss}),
        topology,
        1,
        lambda stage, **numbers: None,
    )
    logger.removeHandler(handler)
    return records


@pytest.mark.parametrize(("name", "is_worse"), [("own", False), ("other", True)])
def test_a_run_and_stored_targets_of_a_teacher_of_other_ids_begin_with_a_warning(
    name: str, is_worse: bool, manifest: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    (warnings,) = run_ranks(1, _train_and_store, str(manifest), str(tmp_path), str(teachers[name]))
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "teacher_above_uniform"]
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert len(events) == len(warnings) == int(is_worse)
    assert ("worse than the" in log) is is_worse
    if is_worse:
        assert events[0]["teacher_ce"] > events[0]["uniform_ce"]
        assert "its ids are not those of the shards" in warnings[0]
