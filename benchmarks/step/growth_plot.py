"""The figure of growth: time a token of a step and of its products, by sequence length and by vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito: distinct for colour-blind readers.
STEP_COLOUR, PRODUCTS_COLOUR = "#0072b2", "#d55e00"
AXES = {"sequence": "tokens of a sequence", "vocabulary": "ids of the vocabulary"}


@dataclass(frozen=True)
class Point:
    """Seconds a token at one size."""

    value: int
    step: float
    products: float


def draw(points: Mapping[str, Sequence[Point]], to: Path) -> None:
    """Writes the figure: an axes for each number that grows."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (grows, of_size) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        values = [point.value for point in of_size]
        axes.plot(values, [point.step * 1e6 for point in of_size], "o-", color=STEP_COLOUR, label="whole step")
        axes.plot(
            values,
            [point.products * 1e6 for point in of_size],
            "s--",
            color=PRODUCTS_COLOUR,
            label="its products alone",
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.set_xlabel(AXES[grows])
        axes.set_ylabel("µs a token")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(to, dpi=100, metadata={"Software": None})  # the same results give the same bytes
