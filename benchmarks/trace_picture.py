"""The picture of docs/images/profile.png: a step of a trace of `profile`, as a trace viewer shows its main thread.

`python -m benchmarks.trace_picture RUN/profile/rank-00000.json.gz PICTURE`; `make pictures` does it.
"""

import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROWS = 5
"""Rows of the picture: the step, the run's spans, and operators within operators."""

SPANS = {
    "step": "#3B3B3B",
    "student forward": "#56B4E9",
    "loss": "#CC79A7",
    "student backward": "#0072B2",
    "optimizer step": "#003A5C",
    "teacher": "#009E73",
}
"""Colours of the run's ranges by the first words of their names; others are grey, operators pale."""


@dataclass(frozen=True)
class Range:
    """A range of the main thread: times in ms from the begin of the step."""

    name: str
    is_span: bool
    begin: float
    end: float
    row: int


def ranges_of(trace: Path) -> tuple[str, list[Range]]:
    """Name of the second step of a trace (or of its only one), and what the thread did in it, nested by rows."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = [each for each in json.load(file)["traceEvents"] if each.get("ph") == "X"]
    steps = sorted((e for e in events if _is_span(e) and e["name"].startswith("step ")), key=lambda e: e["ts"])
    step = steps[min(1, len(steps) - 1)]
    begin, end = step["ts"], step["ts"] + step["dur"]
    inside = [
        event
        for event in events
        if event.get("cat") in ("user_annotation", "cpu_op")
        and event["tid"] == step["tid"]
        and begin <= event["ts"] < end
        and not event["name"].startswith("gloo:")  # a message under way, which ends whenever it has arrived
    ]
    around: list[float] = []
    ranges = []
    for event in sorted(inside, key=lambda e: (e["ts"], -e["dur"])):
        while around and around[-1] <= event["ts"]:
            around.pop()
        left, right = (event["ts"] - begin) / 1e3, (event["ts"] + event["dur"] - begin) / 1e3
        ranges.append(Range(event["name"], _is_span(event), left, right, len(around)))
        around.append(event["ts"] + event["dur"])
    return step["name"], ranges


def draw(trace: Path, picture: Path) -> None:
    """Writes the picture (PNG)."""
    title, ranges = ranges_of(trace)
    width = max(each.end for each in ranges)
    figure = Figure(figsize=(12, 3), dpi=110, layout="constrained")
    axes = figure.subplots()
    for each in ranges:
        if each.row < ROWS:
            size = each.end - each.begin
            axes.add_patch(
                Rectangle((each.begin, each.row), size, 0.92, facecolor=_colour(each), edgecolor="white", linewidth=0.3)
            )
            letters = int(200 * size / width)
            if letters >= 4:
                label = each.name if len(each.name) <= letters else f"{each.name[: letters - 1]}…"
                colour = "white" if each.is_span else "#333333"
                axes.text(each.begin + width / 900, each.row + 0.5, label, fontsize=7, va="center", color=colour)
    axes.set_xlim(0, width)
    axes.set_ylim(ROWS, 0)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(f"ms from the begin of {title}; main thread of one rank, under torch.profiler", fontsize=9)
    figure.savefig(picture)


def _is_span(event: dict[str, Any]) -> bool:
    return event.get("cat") == "user_annotation"


def _colour(each: Range) -> str:
    if not each.is_span:
        return "#F3DFB9" if each.row % 2 else "#EAD1A0"
    return next((colour for name, colour in SPANS.items() if each.name.startswith(name)), "#8A8A8A")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
