"""Whole runs whose ranks share sequences learn as one process does: teacher stages, targets, probe, resumes."""

from pathlib import Path
from typing import Any

import pytest

from megadistill.config.recipe import Recipe
from megadistill.datagen.store_targets import store_on_ranks
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.events import read_validations
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from tests.ranks.harness import run_ranks
from tests.ranks.train.test_loop import BATCH, STEPS, _assert_alike, _numbers, manifest, recipe, teacher

__all__ = ["manifest", "teacher"]

LOSS: dict[str, Any] = {"targets": {"draws": 8}, "ce_weight": 0.1, "diagnostics_every": 2}


def _setup(topology: Topology, manifest: str, folder: str, teacher: dict[str, Any], loss: dict[str, Any]) -> Any:
    base = recipe(Path(manifest), Path(folder)).snapshot()
    changes: dict[str, Any] = {
        "objective": "distill",
        "teacher": teacher,
        "loss": loss,
        "data": {**base["data"], "document_mask": True},
        "validation": {
            "every": 2,
            "data": {"unseen": str(Path(manifest).parent.parent / "heldout" / "manifest.json"), "trained": manifest},
            "sequences": 3,
        },
        "train": {**base["train"], "micro_batch": BATCH // topology.data_world // 2},
        "distributed": {"sequence": topology.sequence_ranks, "vocab_group": topology.group_size},
    }
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return prepare(Recipe.model_validate({**base, **changes}), launch)


def _train(topology: Topology, manifest: str, folder: str, *sections: dict[str, Any], stop: int | None = None) -> None:
    run(_setup(topology, manifest, folder, *sections), topology, stop_after=stop)


def _stops(topology: Topology, manifest: str, folder: str, *sections: dict[str, Any]) -> None:
    _train(topology, manifest, folder, *sections, stop=3)


def _store(topology: Topology, manifest: str, folder: str, teacher: dict[str, Any]) -> None:
    store_on_ranks(_setup(topology, manifest, folder, teacher, LOSS), topology, STEPS, lambda stage, **numbers: None)


def _learned(folder: Path) -> list[dict[str, Any]]:
    """The numbers of each step, but those of tenths of the tokens: a call of the loss has other tokens."""
    lines = _numbers(folder)
    for line in lines:
        named = line.get("diagnostics", {})
        line["diagnostics"] = {name: value for name, value in named.items() if "decile" not in name}
    return lines


@pytest.fixture(scope="module")
def whole_run(manifest: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(1, _train, str(manifest), str(folder), {"path": str(teacher)}, LOSS)
    return folder


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> list[dict[str, Any]]:
    """Its numbers."""
    return _learned(whole_run)


def _require_measured_alike(folder: Path, whole_run: Path) -> None:
    ours, theirs = (list(read_validations(each)) for each in (folder, whole_run))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 2, 4, 5]
    for one, other in zip(ours, theirs, strict=True):
        assert one["splits"].keys() == other["splits"].keys() == {"all", "unseen", "trained"}
        for name, measures in other["splits"].items():
            assert "kl" in measures
            assert one["splits"][name] == pytest.approx(measures, rel=2e-5, abs=1e-6), name


def test_two_ranks_learn_from_parts_as_one_from_wholes_and_resume(
    whole: list[dict[str, Any]], whole_run: Path, manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    arguments = (str(manifest), str(tmp_path), {"path": str(teacher)}, LOSS)
    run_ranks(2, _stops, *arguments, vocab_group=1, sequence=2)
    run_ranks(2, _train, *arguments, vocab_group=1, sequence=2)
    _assert_alike(_learned(tmp_path), whole)
    _require_measured_alike(tmp_path, whole_run)


@pytest.mark.thorough
def test_stages_share_sequences_and_the_teacher_check_gathers_them(
    whole: list[dict[str, Any]], whole_run: Path, manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    """Four ranks: two stages, each shared by two ranks. A process alone has recorded the teacher's output: another one
    ends the run."""
    arguments = (str(manifest), str(tmp_path), {"path": str(teacher)}, LOSS)
    run_ranks(1, _stops, *arguments)
    run_ranks(4, _train, *arguments, vocab_group=2, sequence=2)
    _assert_alike(_learned(tmp_path), whole)
    _require_measured_alike(tmp_path, whole_run)


@pytest.mark.thorough
def test_stored_targets_of_whole_sequences_teach_ranks_that_share_them(
    whole: list[dict[str, Any]], manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    targets, run_folder, loss = tmp_path / "targets", tmp_path / "run", {**LOSS, "diagnostics_every": 0}
    live = {"path": str(teacher), "save_targets": str(targets)}
    run_ranks(1, _store, str(manifest), str(tmp_path / "unused"), live)
    stored = {"source": "stored", "targets": str(targets)}
    run_ranks(2, _train, str(manifest), str(run_folder), stored, loss, vocab_group=1, sequence=2)
    numbers = _learned(run_folder)
    for name in ("loss", "grad_norm", "student_ce"):
        assert [line[name] for line in numbers] == pytest.approx([line[name] for line in whole], rel=2e-5), name
