"""Plots of an evaluation: their values are those of the results."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from megadistill.evaluate.evaluation import CalibrationBin
from megadistill.report.sections.evaluation_section import calibration_figure, deciles_figure, write_plots
from tests.unit.evaluate.test_evaluation_tables import ALONE, LARGE

BINS = (CalibrationBin(250_000_000, 0.02, 0.04), CalibrationBin(750_000_000, 0.07, 0.05))
FIRST = replace(LARGE, calibration=(*BINS, *[CalibrationBin(0, None, None)] * 19))


def test_a_reliability_diagram_has_the_accuracies_and_the_shares_of_its_bins() -> None:
    figure = calibration_figure([FIRST, *[replace(FIRST, model=f"model {n}") for n in range(5)]])
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 12, "two for each model"
    bars = sorted(
        ([bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)] for axes in panels), key=len
    )
    assert bars[0] == [0.04, 0.05], "an empty bin has no bar"
    assert bars[-1] == [25.0, 75.0] + [0.0] * 19
    points = panels[0].get_lines()[1]
    assert np.asarray(points.get_xydata()).tolist() == [[0.02, 0.04], [0.07, 0.05]]


def test_the_deciles_are_drawn_of_each_model_and_the_kl_of_the_students() -> None:
    student = replace(LARGE, model="student")
    cross_entropy, kl = deciles_figure([LARGE, student]).axes
    assert (len(cross_entropy.get_lines()), len(kl.get_lines())) == (2, 1)
    assert np.asarray(kl.get_lines()[0].get_ydata())[:9] == pytest.approx([0.125 * n for n in range(9)])
    assert len(deciles_figure([LARGE]).axes) == 1


def test_what_needs_a_teacher_is_drawn_with_one(tmp_path: Path) -> None:
    hostile = replace(FIRST, model="$\\undefined{[red]" + 50 * "long")
    assert [path.name for path in write_plots([ALONE], tmp_path / "alone")] == ["calibration.png"]
    written = write_plots([hostile, FIRST], tmp_path / "both")
    assert [path.name for path in written] == ["calibration.png", "deciles.png"]
    for path in written:
        assert imread(path).std() > 0.05, "the picture is not blank"
