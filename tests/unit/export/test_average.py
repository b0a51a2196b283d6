"""Averages of checkpoints: numpy's numbers to the last bit, exported like any checkpoint, resumed by no run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from megadistill.config.recipe import Recipe
from megadistill.errors import OperatorFault, UserError
from megadistill.export import average, pinned
from megadistill.export.average import average_run, average_weights
from megadistill.export.export_run import export_run
from megadistill.train.checkpoint.attempt import acquire
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import VOCABULARY_TABLES, Checkpoint
from megadistill.train.checkpoint.rollback import Rollback, record_rollbacks
from megadistill.train.checkpoint.select import latest_valid
from megadistill.train.checkpoint.writer import remove
from megadistill.train.setup.parent_checkpoint import find_parent
from tests.unit.export.test_export_run import _checkpoint, _parameters, _run
from tests.unit.train.cases import VOCAB, topology

STEPS = (2, 4, 6)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of different weights, each of three ranks."""
    folder, made = _run(tmp_path)
    for step in STEPS:
        _checkpoint(folder, made, step=step, seed=step)
    return folder


def _truth(steps: tuple[int, ...], decay: float | None) -> dict[str, NDArray[np.float32]]:
    """The averages in numpy's float64, by the definition of each."""
    values = [{name: each.numpy().astype(np.float64) for name, each in _parameters(step).items()} for step in steps]
    weights = [1 / len(steps)] * len(steps)
    if decay is not None:
        weights = [decay ** (len(steps) - 1), *((1 - decay) * decay**left for left in range(len(steps) - 2, -1, -1))]
    summed = {name: np.zeros_like(values[0][name]) for name in values[0]}
    for parameters, weight in zip(values, weights, strict=True):
        for name, value in parameters.items():
            summed[name] = summed[name] + weight * value
    return {name: value.astype(np.float32) for name, value in summed.items()}


@pytest.mark.parametrize(("last", "decay", "steps"), [(3, None, STEPS), (2, None, (4, 6)), (None, 0.75, STEPS)])
@pytest.mark.parametrize("max_file_bytes", [1 << 30, 20_000])
def test_an_average_is_numpys_in_float64_to_the_last_bit(
    run: Path, last: int | None, decay: float | None, steps: tuple[int, ...], max_file_bytes: int
) -> None:
    folder = average_run(run, last=last, decay=decay, max_file_bytes=max_file_bytes)
    averaged = Checkpoint(folder)
    averaged.verify()
    for name, value in _truth(steps, decay).items():
        assert averaged.parameter(name).numpy().tobytes() == value.tobytes(), name
    files = list(folder.glob("*.safetensors"))
    assert all(file.stat().st_size < max_file_bytes + 10_000 for file in files)  # a header of a few kilobytes
    assert len(files) == averaged.manifest.world
    assert (len(files) > 1) == (max_file_bytes < 1 << 30)
    record = averaged.manifest.average
    assert record is not None
    assert tuple(each.step for each in record.checkpoints) == steps
    assert sum(each.weight for each in record.checkpoints) == pytest.approx(1, abs=1e-12)
    assert _left(run) == [folder.name]  # no pin and no draft


@pytest.mark.parametrize("paddings", [(256, 258, 255), (255, 252, 260)])
def test_checkpoints_of_ranks_with_other_paddings_of_the_vocabulary_are_averaged(
    tmp_path: Path, paddings: tuple[int, ...]
) -> None:
    """A run that was resumed on other numbers of ranks: the average has the newest one's rows."""
    folder, made = _run(tmp_path)
    for step, padded in zip(STEPS, paddings, strict=True):
        _checkpoint(folder, made, step=step, seed=step, padded=padded)
    averaged = Checkpoint(average_run(folder, last=3, decay=None, max_file_bytes=20_000))
    for name, value in _truth(STEPS, None).items():
        parameter = averaged.parameter(name).numpy()
        rows = VOCAB if name in VOCABULARY_TABLES else len(value)
        assert parameter[:rows].tobytes() == value[:rows].tobytes(), name
        assert len(parameter) == (paddings[-1] if name in VOCABULARY_TABLES else len(value))


def test_the_weights_of_a_moving_average_are_those_of_its_recursion() -> None:
    values, decay = [3.0, -1.0, 5.0, 2.0], 0.9
    moving = values[0]
    for value in values[1:]:
        moving = decay * moving + (1 - decay) * value
    weights = average_weights(4, decay)
    assert sum(weight * value for weight, value in zip(weights, values, strict=True)) == pytest.approx(
        moving, abs=1e-12
    )


def test_an_average_is_exported_with_its_origin(run: Path, tmp_path: Path) -> None:
    folder = average_run(run, last=None, decay=0.5)
    export_run(folder, tmp_path / "out", step=None, max_shard_bytes=10_000, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    truth = _truth(STEPS, 0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(truth[name][: parameter.shape[0]])), name
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| average | exponential moving average, decay 0.5 a checkpoint, of weights alone, in float64 |" in card
    for step, weight in zip(STEPS, ("0.25", "0.25", "0.5"), strict=True):
        sha256 = Checkpoint(run / "checkpoints" / f"step-{step:08d}").manifest.sha256
        assert f"| part of it | step {step}, weight {weight}; sha256 of its manifest `{sha256}` |" in card
    assert "| ranks |" not in card
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_no_run_resumes_from_an_average_or_begins_from_it(run: Path, tmp_path: Path) -> None:
    folder = average_run(run, last=2, decay=None)
    values = json.loads((run / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    values["run"] = {**values["run"], "folder": str(tmp_path / "other"), "begin_from": str(folder)}
    with pytest.raises(UserError, match=r"run\.begin_from: .* is an average .* name DIR in student\.weights"):
        find_parent(Recipe.model_validate(values))
    folder.rename(run / "checkpoints" / "moved")
    remove(run / "checkpoints" / "step-00000006")
    (run / "checkpoints" / "moved").rename(run / "checkpoints" / "step-00000006")
    chosen, quarantined = latest_valid(run / "checkpoints", topology(), acquire(run, {}), saved_before=True)
    assert chosen is not None
    assert chosen.manifest.step == 4
    assert ["no optimizer state" in each.reason for each in quarantined] == [True]


def test_the_checkpoints_of_a_run_do_not_mention_averages(run: Path) -> None:
    """So that a version without them reads the checkpoints of this one."""
    assert "average" not in json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())


def test_a_run_that_deletes_its_checkpoints_meanwhile_does_not_matter(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(folder: Path) -> Checkpoint:
        for path in checkpoint_folders(run / "checkpoints").values():
            remove(path)
        return Checkpoint(folder)

    monkeypatch.setattr(average, "Checkpoint", opened)
    averaged = Checkpoint(average_run(run, last=3, decay=None))
    name, value = next(iter(_truth(STEPS, None).items()))
    assert averaged.parameter(name).numpy().tobytes() == value.tobytes()


def test_a_checkpoint_that_is_gone_before_it_is_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_link_files", _gone)
    with pytest.raises(UserError, match=r"step-00000004: the run deleted it .*checkpoint\.keep_last"):
        average_run(run, last=2, decay=None)


def _gone(folder: Path, link: Path) -> None:
    raise FileNotFoundError(2, "No such file or directory", str(folder))


def test_without_hard_links_checkpoints_are_read_where_they_lie(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    averaged = Checkpoint(average_run(run, last=3, decay=None))
    name, value = next(iter(_truth(STEPS, None).items()))
    assert averaged.parameter(name).numpy().tobytes() == value.tobytes()
    assert "no hard links there (Operation not permitted)" in caplog.text
    assert len(checkpoint_folders(run / "checkpoints")) == 3


def test_what_cannot_be_averaged_is_refused_in_a_line(run: Path, tmp_path: Path) -> None:
    for last, decay, reason in [
        (None, None, "give --last K for a mean of K checkpoints, or --ema DECAY"),
        (1, None, "needs at least 2"),
        (4, None, r"has 3 checkpoints to average \(steps: 2, 4, 6\), --last asks for 4"),
        (None, 1.0, "give a decay between 0 and 1"),
    ]:
        with pytest.raises(UserError, match=reason):
            average_run(run, last=last, decay=decay)
    with pytest.raises(UserError, match="not a run folder"):
        average_run(tmp_path, last=2, decay=None)
    average_run(run, last=2, decay=None)
    with pytest.raises(UserError, match="exists already"):
        average_run(run, last=2, decay=None)
    record_rollbacks(run, [Rollback(at_step=7, to_step=4, skipped_slots=(30, 50), reason="a spike")])
    with pytest.raises(UserError, match=r"has 2 checkpoints to average \(steps: 2, 4\)"):
        average_run(run, last=3, decay=None)
    record_rollbacks(run, [Rollback(at_step=7, to_step=2, skipped_slots=(20, 50), reason="a spike")])
    with pytest.raises(UserError, match=r"has 1 checkpoint to average \(steps: 2\), an average needs 2"):
        average_run(run, last=None, decay=0.5)
    record_rollbacks(run, [Rollback(at_step=7, to_step=4, skipped_slots=(30, 50), reason="a spike")])
    file = run / "checkpoints" / "step-00000002" / "rank-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(OperatorFault, match=r"rank-00001-of-00003\.safetensors is damaged"):
        average_run(run, last=None, decay=0.5)
    assert _left(run) == ["mean-of-2-to-00000006"]


def _left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "averages").iterdir() if path.name != pinned.LOCK)


def test_what_a_killed_average_left_is_removed_by_the_next_and_two_do_not_meet(run: Path) -> None:
    left = run / "averages" / ".pinned-abc" / "step-00000002"
    left.mkdir(parents=True)
    with pinned.sole_writer(run / "averages", "megadistill average"):
        assert not left.exists()
        with pytest.raises(UserError, match="another `megadistill average` is writing to"):
            average_run(run, last=2, decay=None)
