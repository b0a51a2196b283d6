"""The metrics of a run: lines of JSON that survive a kill and a resume; throughput and MFU by hand."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megadistill.config.recipe import LossSection, TargetsSection
from megadistill.divergence import DivergenceKind
from megadistill.models.families import load_config
from megadistill.timeline.stopwatch import StepSeconds
from megadistill.tracking.groups import tag_of
from megadistill.train.telemetry import metrics
from megadistill.train.telemetry.metrics import TEACHER_METRICS, Meter, RunLog, peak_flops
from megadistill.train.telemetry.rank_flops import RankFlops
from megadistill.types import METRIC_NAMES, StepReport
from tests.unit.train.cases import MODEL, VOCAB, recipe, step_shape, topology

REPORT = StepReport(
    step=1,
    tokens=256,
    loss=1.5,
    divergence=0.25,
    kl=0.5,
    student_ce=2.5,
    teacher_ce=2.0,
    student_entropy=2.1,
    teacher_entropy=1.9,
    agreement=0.4,
    log_z=0.1,
    learning_rate=1e-3,
    grad_norm=0.7,
    seconds=2.0,
    tokens_per_second=128.0,
    data_seconds=0.125,
    student_seconds=0.5,
    loss_seconds=0.3,
    teacher_seconds=0.25,
    wait_seconds=0.05,
    mfu=None,
    student_mfu=None,
    teacher_mfu=None,
    memory_bytes=10,
)


ABSENT = ("diagnostics", "experts", "expert_load", "norms")
"""Numbers that most steps do not have."""

FORWARD_KL = LossSection()


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megadistill")


def _log(
    folder: Path,
    steps: range,
    *,
    loss: LossSection | None = FORWARD_KL,
    rank: int = 0,
    log_every: int = 1,
    weights: dict[str, float] | None = None,
    epoch_tokens: int | None = None,
    tokens_per_step: int | None = None,
    **changes: Any,
) -> None:
    """A run that resumes from the step before the first of `steps`."""
    changed: dict[str, Any] = {"train": {"steps": 9, "log_every": log_every}}
    if loss is not None:
        changed["loss"] = loss.model_dump()
    log = RunLog(
        folder,
        recipe(Path("manifest.json"), folder, teacher=Path("teacher") if loss is not None else None, **changed),
        start_step=steps.start - 1,
        start_tokens=256 * (steps.start - 1),
        topology=topology(rank=rank, world=rank + 1),
        epoch_tokens=epoch_tokens,
    )
    for step in steps:
        report = replace(REPORT, step=step, tokens=256 * step, **changes)
        log.step(report, tokens_per_step=tokens_per_step, more=weights)
    log.close()


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_step_is_a_line_of_json(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 4))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
    first = _lines(tmp_path)[0]
    assert 0 <= time.time() - first.pop("time") < 60
    assert first == {name: value for name, value in REPORT.__dict__.items() if name not in ABSENT}
    assert any("tfevents" in path.name for path in tmp_path.iterdir())


def test_a_log_line_says_how_many_tokens_are_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _log(tmp_path, range(1, 2), tokens_per_step=256, labels=64)
        _log(tmp_path, range(2, 3), tokens_per_step=256, labels=256)
    first, second = (record.getMessage() for record in caplog.records)
    assert ", 25.0% of the step's with a label |" in first
    assert "label" not in second
    assert [line["labels"] for line in _lines(tmp_path)] == [64, 256]


def test_a_resume_drops_what_was_logged_past_the_checkpoint(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    _log(tmp_path, range(4, 5))
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[:3] == before
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    _log(tmp_path, range(1, 2))
    assert [line["step"] for line in _lines(tmp_path)] == [1], "a start without a checkpoint starts anew"


def test_a_last_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    _log(tmp_path, range(4, 5))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 4]


def test_a_run_from_labels_has_no_metrics_of_a_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _log(tmp_path, range(1, 2), loss=None)
    (line,) = _lines(tmp_path)
    assert set(line) == {"time", *REPORT.__dict__} - {*TEACHER_METRICS, *ABSENT}
    assert not [name for name in line if "teacher" in name or name in ("divergence", "kl", "agreement")]
    assert "kl" not in caplog.text


def test_diagnostics_are_an_object_on_the_steps_that_have_them(tmp_path: Path) -> None:
    diagnostics = {"acceptance": 0.75, "kl_entropy_decile_10": 0.5}
    _log(tmp_path, range(1, 2))
    _log(tmp_path, range(2, 3), diagnostics=diagnostics)
    first, second = _lines(tmp_path)
    assert "diagnostics" not in first
    assert second["diagnostics"] == diagnostics
    last = max(tmp_path.glob("*tfevents*"), key=lambda path: path.stat().st_mtime_ns)
    board = EventAccumulator(str(last))  # files of one second are read in the order of a counter's digits
    board.Reload()
    for name, value in diagnostics.items():
        assert [(event.step, event.value) for event in board.Scalars(f"diagnostics/{name}")] == [(2, value)]


def test_the_divergence_from_truncated_targets_is_not_called_kl(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`kl` is that of the complete distributions, which a run has on its diagnosed steps alone."""
    loss = LossSection(targets=TargetsSection())
    _log(tmp_path, range(1, 2), loss=loss)
    (line,) = _lines(tmp_path)
    assert not {"kl", "divergence", "teacher_ce", "teacher_entropy", "agreement"} & set(line)
    assert line["targets_kl"] == 0.25
    assert "| targets_kl 0.2500 | lr" in caplog.text
    assert tag_of("targets_kl") == "loss/targets_kl"
    _log(tmp_path, range(2, 3), loss=loss, diagnostics={"forward_kl": 0.75, "jsd": 0.125})
    line = _lines(tmp_path)[1]
    assert (line["kl"], line["targets_kl"], line["teacher_ce"], line["agreement"]) == (0.75, 0.25, 2.0, 0.4)
    assert line["diagnostics"] == {"jsd": 0.125}, "one number, in one place"
    assert "| targets_kl 0.2500 | kl 0.7500 | agree 40.0% |" in caplog.text


def test_kl_is_at_temperature_one_or_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loss = LossSection(temperature=2.0)
    _log(tmp_path, range(1, 2), loss=loss)
    _log(tmp_path, range(2, 3), loss=loss, diagnostics={"forward_kl": 0.75})
    without, diagnosed = _lines(tmp_path)
    assert "kl" not in without
    assert (without["divergence"], diagnosed["divergence"], diagnosed["kl"]) == (0.25, 0.25, 0.75)
    assert "| forward_kl 0.2500 | agree" in caplog.text
    assert "| forward_kl 0.2500 | kl 0.7500 | agree" in caplog.text


def test_kl_of_the_complete_distribution_is_on_every_step(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 3), diagnostics={"forward_kl": 0.75})
    assert [line["kl"] for line in _lines(tmp_path)] == [0.5, 0.5]


def test_another_divergence_is_logged_beside_the_kl(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _log(tmp_path, range(1, 2))
    assert "0.2500" not in caplog.text
    _log(tmp_path, range(2, 3), loss=LossSection(divergence=DivergenceKind.JSD))
    assert "| jsd 0.2500 | kl 0.5000 |" in caplog.text


def test_weights_are_logged_where_a_schedule_moves_them(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 2), weights={"kd_weight": 0.25, "ce_weight": 0.75})
    (line,) = _lines(tmp_path)
    assert (line["kd_weight"], line["ce_weight"]) == (0.25, 0.75)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 4), rank=1)
    assert not list(tmp_path.iterdir())


def test_every_few_steps_and_at_the_end_there_is_a_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _log(tmp_path, range(1, 10), log_every=4)
    lines = caplog.messages
    assert [line.split(" | ")[0] for line in lines] == ["step 4/9", "step 8/9", "step 9/9"]
    for part in (
        "loss 1.5000",
        "ce 2.5000",
        "kl 0.5000",
        "agree 40.0%",
        "lr 0.001",
        "grad 0.7",
        "1.02k tokens",
        "128 tokens/s",
    ):
        assert f"| {part}" in lines[0]
    assert "mfu" not in lines[0]


def _report(monkeypatch: pytest.MonkeyPatch, peak: float | None, *, teacher: bool) -> StepReport:
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: peak)
    config = load_config({**MODEL, "vocab_size": VOCAB}, what="test")
    meter = Meter(
        student=config,
        teachers=[(1.0, config)] if teacher else [],
        precision="bfloat16",
        topology=topology(world=2),
        flops=lambda shape: RankFlops(step=40_000_000, stage_round=7_000_000),
    )
    return meter.report(
        3,
        dict.fromkeys(METRIC_NAMES, 1.0),
        learning_rate=1e-3,
        grad_norm=2.0,
        shape=step_shape(sequence_length=32, global_batch=8),
        tokens=768,
        seconds=0.5,
        data_seconds=0.01,
        parts=StepSeconds(student=0.2, loss=0.05, teacher=0.1, wait=0.03, stage=0.07, rounds=4 if teacher else 0),
    )


@pytest.mark.parametrize("teacher", [False, True])
def test_model_flops_over_the_peak_of_all_ranks(monkeypatch: pytest.MonkeyPatch, teacher: bool) -> None:
    """fwd = 2B + 2Vd + 2Lsa; the student costs 3 of it, the teacher 1; recomputation is no model FLOP."""
    per_layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32  # q, k and v, o, gate up down, two norms
    body, head, attention = 2 * (2 * per_layer + 32), 2 * VOCAB * 32, 2 * 2 * 32 * 32
    flops = 3 * (body + head + attention)
    flops += body + head + attention if teacher else 0
    report = _report(monkeypatch, 1e9, teacher=teacher)
    assert report.tokens_per_second == 512.0
    assert report.tokens == 3 * 256
    assert report.mfu == pytest.approx(512.0 * flops / (2 * 1e9), rel=1e-12)
    assert report.student_mfu == pytest.approx(40e6 / 0.25 / 1e9), "of one device"
    assert report.teacher_mfu == (pytest.approx(4 * 7e6 / 0.07 / 1e9) if teacher else None)
    assert (report.student_seconds, report.loss_seconds, report.teacher_seconds, report.wait_seconds) == (
        0.2, 0.05, 0.1, 0.03,
    )  # fmt: skip


def test_mfu_is_left_out_where_the_peak_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _report(monkeypatch, None, teacher=True).mfu is None
    monkeypatch.undo()
    assert peak_flops(torch.device("cpu"), "float32") is None


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [("NVIDIA H100 80GB HBM3", "bfloat16", 989e12), ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12), ("Toy", "x", None)],
)
def test_the_peak_follows_from_the_name_of_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None
) -> None:
    class Module:
        @staticmethod
        def get_device_name(device: torch.device) -> str:
            return name

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    assert peak_flops(torch.device("cuda", 0), precision) == peak
