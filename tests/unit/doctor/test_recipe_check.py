"""Every part of a recipe is looked at, whatever is wrong with another; what a run refuses is never missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megadistill.distributed.launch import Launch, SeparateReplica
from megadistill.doctor import recipe_check
from megadistill.doctor.comparison import contents_row
from megadistill.doctor.rank_report import RankReport, Status
from megadistill.doctor.recipe_check import check_recipe
from megadistill.errors import UserError
from tests.unit.train.cases import described_data, described_teacher, recipe, run_with_checkpoint

ONE = Launch(0, 1, 0, 1)


def _statuses(own: RankReport) -> dict[str, Status]:
    return {each.check: each.status for each in own.results}


def _checked(folder: Path, values: dict[str, Any], launch: Launch = ONE) -> tuple[RankReport, bool]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    own = RankReport(0, "a")
    _, setup = check_recipe(own, path, [], launch)
    return own, setup is not None


def _well(folder: Path) -> dict[str, Any]:
    teacher = described_teacher(folder / "teacher")
    return recipe(described_data(folder / "data"), folder / "run", teacher=teacher).snapshot()


def test_one_fault_does_not_hide_the_next(tmp_path: Path) -> None:
    values = _well(tmp_path)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    values["distributed"]["vocab_group"] = 3
    values["student"]["deepspeed"] = "none.json"
    own, runs = _checked(tmp_path, values, Launch(0, 2, 0, 2))
    statuses = _statuses(own)
    assert not runs
    bad = {check for check, status in statuses.items() if status is Status.FAIL}
    assert bad == {"launch", "DeepSpeed's file", "shards", "teacher's weights"}
    assert "setup" not in statuses  # the first refusal of `prepare` is a result already


def test_a_refusal_is_one_row(tmp_path: Path) -> None:
    """A vocab group that does not fit the launch is a fault of the launch, not of the vocabulary as well."""
    values = _well(tmp_path)
    values["distributed"]["vocab_group"] = 2
    own, runs = _checked(tmp_path, values)
    assert not runs
    failed = {result.check: result.detail for result in own.results if result.status is Status.FAIL}
    assert list(failed) == ["launch", "shards"], "those of described data are not there"
    assert "vocab_group is 2" in failed["launch"]


def test_a_replica_that_is_a_launch_of_its_own_is_one_of_all(tmp_path: Path) -> None:
    launch = replace(ONE, separate=SeparateReplica(1, 2, "n1", 29600))
    own, _ = _checked(tmp_path, _well(tmp_path), launch)
    (row,) = [result for result in own.results if result.check == "launch"]
    assert (row.status, row.detail.startswith("2 ranks,")) == (Status.OK, True)
    assert row.detail.endswith("2 replicas of 1 rank")


def test_what_only_the_whole_shows_is_a_row_of_its_own(tmp_path: Path) -> None:
    values = _well(tmp_path)
    values["student"]["config"]["max_position_embeddings"] = 8
    own, runs = _checked(tmp_path, values)
    assert not runs
    assert _statuses(own)["setup"] is Status.FAIL
    assert _statuses(own)["student"] is Status.OK


def test_the_students_weights_are_looked_at_like_the_teachers(tmp_path: Path) -> None:
    values = _well(tmp_path)
    values["student"]["weights"] = values["teacher"]["path"]
    own, runs = _checked(tmp_path, values)
    assert _statuses(own)["student's weights"] is Status.OK
    assert own.facts["content"]["student"] == own.facts["content"]["teacher"]
    (tmp_path / "teacher" / "model.safetensors").unlink()
    own, runs = _checked(tmp_path, values)
    assert not runs
    assert _statuses(own)["student's weights"] is Status.FAIL


def test_a_recipe_that_cannot_be_read_ends_the_look_at_it(tmp_path: Path) -> None:
    values = _well(tmp_path)
    values["trian"] = values.pop("train")
    own, runs = _checked(tmp_path, values)
    assert not runs
    assert _statuses(own) == {"recipe": Status.FAIL}


def test_every_refusal_of_prepare_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("the moon is full")

    monkeypatch.setattr(recipe_check, "prepare", refuse)
    own, _ = _checked(tmp_path, _well(tmp_path))
    assert own.results[-1].detail == "the moon is full"


def test_a_setting_that_is_probably_a_mistake_is_a_warning(tmp_path: Path) -> None:
    values = _well(tmp_path)
    values["train"].update(steps=130, global_batch=8, schedule={})
    own, runs = _checked(tmp_path, values)
    assert runs, "a warning does not keep the run from starting"
    (epochs,) = [each for each in own.results if each.status is Status.WARN]
    assert epochs.check == "epochs"
    assert "130 epochs of 256 tokens" in epochs.detail
    values["train"]["steps"] = 3
    own, _ = _checked(tmp_path, values)
    assert Status.WARN not in _statuses(own).values()


def test_held_out_splits_are_a_row_of_their_own_and_its_fault_is_named_by_the_key(tmp_path: Path) -> None:
    values = _well(tmp_path)
    held_out = described_data(tmp_path / "heldout")
    values["validation"] = {"every": 2, "data": {"web": str(held_out)}}
    own, _ = _checked(tmp_path, values)
    (row,) = [each for each in own.results if each.check == "held-out splits"]
    assert row.status is Status.FAIL, "its shard is not there"
    assert row.detail.startswith("validation.data.web, shard 0: ")


def test_what_auto_comes_to_is_a_row(tmp_path: Path) -> None:
    values = _well(tmp_path)
    values["student"]["attention"] = "eager"
    own, _ = _checked(tmp_path, values)
    (row,) = [each for each in own.results if each.check == "kernels"]
    assert row.status is Status.OK
    assert row.detail == (
        "student.attention eager (by the recipe); student.compile, teacher.compile and loss.elementwise eager (a CPU, "
        "where compiling takes a minute of C++); teacher.attention sdpa (causal alone, which needs no mask)"
    )


def test_the_checkpoint_from_which_a_run_begins_is_looked_at(tmp_path: Path) -> None:
    values = recipe(described_data(tmp_path / "data"), tmp_path / "run").snapshot()
    start = run_with_checkpoint(tmp_path / "parent", tmp_path / "data" / "manifest.json", step=4)
    values["run"]["begin_from"] = str(tmp_path / "parent")
    own, runs = _checked(tmp_path, values)
    (row,) = [each for each in own.results if each.check == "parent"]
    assert runs
    assert row.status is Status.OK
    assert row.detail.startswith(f"{start}: step 4, of this student and this data; every file has its size")
    values["train"]["steps"] = 4
    own, runs = _checked(tmp_path, values)
    assert not runs
    assert _statuses(own)["parent"] is Status.FAIL
    assert "setup" not in _statuses(own), "it is said once"


def test_missing_ranks_and_files_are_not_repeated_as_a_fault_of_the_set_up(tmp_path: Path) -> None:
    values = _well(tmp_path)
    values["teacher"]["path"] = str(tmp_path / "nowhere")
    values["distributed"]["vocab_group"] = 8
    own, runs = _checked(tmp_path, values)
    statuses = _statuses(own)
    assert not runs
    assert {statuses["launch"], statuses["teacher"]} == {Status.FAIL}
    assert not {"setup", "teacher's weights"} & statuses.keys()
    row = contents_row([own])
    assert row is not None
    assert "teacher" not in row.detail


def test_what_the_run_reads_is_told_in_epochs(tmp_path: Path) -> None:
    values = _well(tmp_path)
    values["train"].update(steps=3, global_batch=8)
    own, _ = _checked(tmp_path, values)
    (data,) = [each.detail for each in own.results if each.check == "data"]
    assert data == "8 sequences of 32 tokens in 1 shard; the run reads 24, 3 epochs"
