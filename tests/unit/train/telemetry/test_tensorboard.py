"""The TensorBoard log: groups, charts, the recipe, and histograms as numpy computes them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.histogram.metadata import PLUGIN_NAME

from megadistill.train.telemetry.histograms import BINS, histograms
from megadistill.train.telemetry.tensorboard import TensorBoardLog, tag_of
from megadistill.types import StepReport
from tests.unit.train.cases import recipe, topology


def _read(folder: Path) -> Any:
    board = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    board.Reload()
    return board


@pytest.mark.parametrize("teacher", [None, Path("teacher")])
def test_every_chart_shows_tags_that_a_run_writes(tmp_path: Path, teacher: Path | None) -> None:
    """A pattern that meets nothing is an empty chart, which nobody would notice before a run is on."""
    folder = tmp_path / "board"
    TensorBoardLog(folder, recipe(tmp_path / "manifest.json", tmp_path, teacher=teacher), start_step=0).close()
    written = _read(folder).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(written)
    charts = [chart for category in layout.category for chart in category.chart]
    assert [category.title for category in layout.category][-2:] == ["Training", "System"]
    assert ("Distillation" in [category.title for category in layout.category]) == (teacher is not None)
    diagnostics = ("acceptance", "reverse_kl", "jsd", "top_16_mass", "kl_entropy_decile_1")
    names = [*StepReport.__dataclass_fields__, *(f"diagnostics/{name}" for name in diagnostics)]
    tags = [tag_of(name) for name in names]
    for chart in charts:
        for pattern in chart.multiline.tag:
            assert [tag for tag in tags if re.match(pattern, tag)], pattern


def test_every_number_of_a_step_has_a_group() -> None:
    numbers = set(StepReport.__dataclass_fields__) - {"step", "diagnostics"}
    assert not [name for name in numbers if tag_of(name).startswith("other/")]
    assert tag_of("diagnostics/jsd") == "diagnostics/jsd"


def test_the_recipe_is_there_to_read(tmp_path: Path) -> None:
    folder = tmp_path / "board"
    url = {"manifest": "s3://me:pass@bucket/manifest.json"}
    changed = recipe(tmp_path, Path("<b>bold</b> # no heading"), data=url)
    TensorBoardLog(folder, changed, start_step=7).close()
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
    board = TensorBoardLog(folder, recipe(tmp_path / "manifest.json", tmp_path), start_step=0)
    board.histograms(3, computed)
    board.close()
    read = _read(folder)
    assert PLUGIN_NAME == "histograms"
    (event,) = read.Histograms("weights/a")
    assert event.step == 3
    assert event.histogram_value.num == 999
    assert event.histogram_value.min == pytest.approx(float(values.min()))
