"""The TensorBoard log: groups, charts, the recipe, and histograms as numpy computes them."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.histogram.metadata import PLUGIN_NAME

from megadistill.config.recipe import Recipe
from megadistill.tracking.groups import tag_of
from megadistill.train.telemetry.histograms import BINS, histograms
from megadistill.train.telemetry.metrics import RunLog, logged_names
from megadistill.train.telemetry.tensorboard import LAYOUT, TensorBoardLog, tags_of
from megadistill.types import DIAGNOSTIC_NAMES, EXPERT_METRICS, NORM_KINDS, StepReport
from tests.unit.train.cases import recipe, topology

TOKENS = 256
"""Tokens of a step."""


def _read(folder: Path) -> Any:
    board = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    return board


DIAGNOSED = {"diagnostics_every": 2}
TARGETS = {"targets": {"draws": 8}}
SCHEDULE = {"schedule": {"kind": "cosine"}}
RECIPES: dict[str, dict[str, Any] | None] = {
    "labels": None,
    "distill": {},
    "diagnosed": DIAGNOSED,
    "targets": TARGETS,
    "diagnosed targets": {**TARGETS, **DIAGNOSED},
    "warm": {"temperature": 2.0, **SCHEDULE},
    "warm, diagnosed": {"temperature": 2.0, **DIAGNOSED},
    "labels, experts": None,
    "distill, experts": {},
}


NULL_ON_A_CPU = {"mfu", "student_mfu", "teacher_mfu"}


def _run(folder: Path, loss: dict[str, Any] | None, steps: range, *, has_experts: bool = False) -> Recipe:
    """The logs of steps of a run; all of a step's numbers are its number."""
    changes = {"loss": loss} if loss else {}
    changes |= {"train": {"norms_every": 2}} if has_experts else {}
    made = recipe(Path("manifest.json"), folder, teacher=None if loss is None else Path("teacher"), **changes)
    start = steps.start - 1
    log = RunLog(
        folder,
        made,
        start_step=start,
        start_tokens=start * TOKENS,
        topology=topology(world=1),
        has_experts=has_experts,
    )
    names = [field.name for field in fields(StepReport)]
    for step in steps:
        diagnosed = dict.fromkeys(DIAGNOSTIC_NAMES, float(step)) if loss and made.loss.diagnostics_every else None
        numbers: dict[str, Any] = {**dict.fromkeys(names, float(step)), "step": step, "tokens": step * TOKENS}
        numbers |= {**dict.fromkeys(NULL_ON_A_CPU), "diagnostics": diagnosed if step % 2 == 0 else None}
        numbers["experts"] = dict.fromkeys(EXPERT_METRICS, float(step)) if has_experts else None
        norms = {"clipped_steps": 0.5, "expected_logit": 2.0, **{kind: {"total": 1.0} for kind in NORM_KINDS}}
        numbers["norms"] = norms if made.train.norms_every and step % made.train.norms_every == 0 else None
        numbers["expert_load"] = {"0": [0.5, 1.5], "3": [1.0, 1.0]} if has_experts and step == 2 else None
        report = StepReport(**numbers)
        weights = {"kd_weight": 1.0, "ce_weight": 0.0} if made.loss.schedule else None
        log.step(report, more=weights)
    log.close()
    return made


def _tags(folder: Path) -> set[str]:
    return {*_read(folder).Tags()["scalars"]}


@pytest.mark.parametrize("name", RECIPES)
def test_every_chart_shows_tags_that_a_run_writes(tmp_path: Path, name: str) -> None:
    """A chart of nothing else is empty, and nobody would notice before a run is on."""
    has_experts = "experts" in name
    made = _run(tmp_path, RECIPES[name], range(1, 4), has_experts=has_experts)
    written = {
        folder: _tags(tmp_path / folder) for folder in (".", "by_tokens", "teacher") if (tmp_path / folder).is_dir()
    }
    layout = layout_pb2.Layout.FromString(
        _read(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    charts = {chart.title: [*chart.multiline.tag] for category in layout.category for chart in category.chart}
    every = set().union(*written.values())
    for title, patterns in charts.items():
        assert [tag for tag in every if any(re.search(pattern, tag) for pattern in patterns)], title
    shown = {tag for tag in every if any(re.search(each, tag) for patterns in charts.values() for each in patterns)}
    expected = {tag for tags in _every_chart().values() for tag in tags}
    assert shown == every & expected, "a chart is left out though its numbers are there"
    assert ("teacher" in written) == (name not in ("labels", "targets", "labels, experts"))
    named = logged_names(made, has_experts=has_experts)
    assert {tag for each in named - NULL_ON_A_CPU for tag in tags_of(each)} == every


def _every_chart() -> dict[str, list[str]]:
    return {title: tags for charts in LAYOUT.values() for title, tags in charts.items()}


def test_student_and_teacher_have_one_chart_and_two_colours(tmp_path: Path) -> None:
    """TensorBoard draws a chart for a tag, and gives each run a colour: the same tag in two runs."""
    _run(tmp_path / "distill", {}, range(1, 3))
    student, teacher = _tags(tmp_path / "distill"), _tags(tmp_path / "distill" / "teacher")
    assert teacher == {"loss/cross_entropy", "predictions/entropy"}
    assert teacher < student
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload().Runs()
    assert set(runs) == {"distill", "distill/teacher", "distill/by_tokens"}, "named as the run is"


def test_a_chart_over_tokens_has_tokens_as_its_steps(tmp_path: Path) -> None:
    _run(tmp_path, {}, range(1, 4))
    events = _read(tmp_path / "by_tokens").Scalars("by_tokens/cross_entropy")
    assert [(event.step, event.value) for event in events] == [(TOKENS, 1), (2 * TOKENS, 2), (3 * TOKENS, 3)]


def test_a_resume_drops_later_points_of_every_axis(tmp_path: Path) -> None:
    _run(tmp_path, {}, range(1, 6))
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*tfevents*")}
    for path in first:  # two writers of one second would be read in the order of their process's counter
        path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    _run(tmp_path, {}, range(3, 5))
    for folder, tag, unit in (
        (".", "loss/kl", 1),
        ("teacher", "loss/cross_entropy", 1),
        ("by_tokens", "by_tokens/kl", TOKENS),
    ):
        assert [event.step for event in _read(tmp_path / folder).Scalars(tag)] == [unit * step for step in (1, 2, 3, 4)]


def test_every_number_of_a_step_has_a_group() -> None:
    for name, loss in RECIPES.items():
        made = recipe(
            Path("m"), Path("f"), teacher=None if loss is None else Path("t"), **({"loss": loss} if loss else {})
        )
        names = logged_names(made, has_experts=True)
        assert not [each for each in names if tag_of(each).startswith("other/")], name
    assert tag_of("diagnostics/jsd") == "diagnostics/jsd"


def test_the_load_of_each_expert_is_a_histogram_of_its_layer(tmp_path: Path) -> None:
    _run(tmp_path, {}, range(1, 4), has_experts=True)
    board = _read(tmp_path)
    assert {*board.Tags()["histograms"]} == {"expert_load/layer_0", "expert_load/layer_3"}
    (uneven,), (even,) = (board.Histograms(f"expert_load/layer_{number}") for number in (0, 3))
    for event, ends, squares in ((uneven, (0.5, 1.5), 2.5), (even, (1.0, 1.0), 2.0)):
        value = event.histogram_value
        assert (event.step, value.min, value.max, value.num) == (2, *ends, 2)
        assert (value.sum, value.sum_squares) == (2.0, squares)
    assert [event.value for event in board.Scalars("experts/max_load")] == [1.0, 2.0, 3.0]


def test_the_recipe_is_there_to_read(tmp_path: Path) -> None:
    folder = tmp_path / "board"
    url = {"manifest": "s3://me:pass@bucket/manifest.json"}
    changed = recipe(tmp_path, Path("<b>bold</b> # no heading"), data=url)
    TensorBoardLog(folder, changed, (), start_step=7, start_tokens=0).close()
    (event,) = _read(folder).Tensors("recipe/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 7
    assert "s3://***@bucket" in text
    assert "\n      steps: 6\n" in text
    assert all(line.startswith("    ") for line in text.splitlines()), "Markdown leaves an indented block alone"


def test_a_histogram_is_numpys(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    pieces = {"weights/a": torch.randn(1000, generator=generator), "weights/constant": torch.full((5,), 2.0)}
    pieces["weights/a"][3] = torch.nan
    computed = histograms({**pieces, "weights/nothing": torch.empty(0)}, topology(world=1))
    assert list(computed) == ["weights/a", "weights/constant"]
    values = pieces["weights/a"][pieces["weights/a"].isfinite()].numpy()
    counts, edges = np.histogram(values, BINS, range=(values.min(), values.max()))
    assert computed["weights/a"].counts == pytest.approx(counts.tolist(), abs=1), "an edge may round to either side"
    assert sum(computed["weights/a"].counts) == 999
    assert computed["weights/a"].limits == pytest.approx(edges[1:].tolist(), abs=1e-6)
    assert computed["weights/a"].sum_squares == pytest.approx(float((values.astype(float) ** 2).sum()))
    assert computed["weights/constant"].counts[0] == 5

    folder = tmp_path / "board"
    board = TensorBoardLog(folder, recipe(tmp_path / "manifest.json", tmp_path), (), start_step=0, start_tokens=0)
    board.histograms(3, computed)
    board.close()
    read = _read(folder)
    assert PLUGIN_NAME == "histograms"
    (event,) = read.Histograms("weights/a")
    assert event.step == 3
    assert event.histogram_value.num == 999
    assert event.histogram_value.min == pytest.approx(float(values.min()))
