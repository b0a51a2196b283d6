"""A timeline as a picture, a row a rank, and as a table of shares.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; what does not compute is pale.
"""

import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table
from rich.text import Text

from megadistill.io import atomic_write
from megadistill.redaction import printable
from megadistill.timeline.spans import COMPUTE, HOST, KINDS, Kind, Span, Timeline, pieces, seconds_by_kind

MAX_ROWS = 64
"""Rows of a picture, and of a table: the trace has all ranks."""

COMPUTE_COLOURS = {
    "teacher": "#009E73",
    "student forward": "#56B4E9",
    "loss": "#CC79A7",
    "student backward": "#0072B2",
    "optimizer step": "#003A5C",
    "other compute": "#7F7F7F",
}
"""Colours of computing spans, by the first words of their names."""
COLOURS = {
    **COMPUTE_COLOURS,
    "wait": "#E3E3E3",
    "send": "#E69F00",
    "data": "#F0E442",
    "save": "#D55E00",
    "host": "#B5A99A",
}
"""Colours of all spans, by the names in the legend of the picture."""


def draw(timeline: Timeline, path: Path) -> None:
    """Writes the picture (PNG)."""
    lanes = timeline.lanes[:MAX_ROWS]
    figure = Figure(figsize=(12, 1.7 + 0.28 * len(lanes)), dpi=110, layout="constrained")
    axes = figure.subplots()
    begin, end = timeline.window
    scale, unit = (1.0, "s") if end - begin >= 20 else (1e3, "ms")
    used = _draw_spans(axes, timeline, scale)
    _mark_steps(axes, timeline, scale)
    hidden = len(timeline.lanes) - len(lanes)
    title = timeline.title + (f" (the first {len(lanes)} of {len(timeline.lanes)} ranks)" if hidden else "")
    axes.set_title(f"{printable(title)}\n", loc="left", fontsize=11, parse_math=False)
    axes.set_xlabel(printable(f"time in {unit}; {timeline.note}"), fontsize=9, parse_math=False)
    labels = [printable(f"{lane.rank}  {lane.role}") for lane in lanes]
    axes.set_yticks(range(len(lanes)), labels, fontsize=9, parse_math=False)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, scale * (end - begin))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    legend = [name for name in COLOURS if name in used]
    patches = [Patch(facecolor=COLOURS[name], edgecolor="#999999", linewidth=0.4, label=name) for name in legend]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, len(legend)), frameon=False, fontsize=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder may have a name for which the font has no letters
        with atomic_write(path) as file:
            figure.savefig(file, format="png")


def _draw_spans(axes: Axes, timeline: Timeline, scale: float) -> set[str]:
    """Draws a row of spans for each rank, and its idle share; returns the names of the colours used."""
    begin, end = timeline.window
    rectangles: dict[str, list[list[tuple[float, float]]]] = {}
    for row, lane in enumerate(timeline.lanes[:MAX_ROWS]):
        for piece in pieces(lane.spans, begin, end):
            left, right = (scale * (edge - begin) for edge in (piece.begin, piece.end))
            top, bottom = row - 0.4, row + 0.4
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            rectangles.setdefault(_colour_name(piece), []).append(corners)
        busy = seconds_by_kind(lane, begin, end).get(COMPUTE, 0.0)
        idle = 1 - busy / (end - begin) if end > begin else 0.0
        axes.text(1.005, row, f"{idle:.0%}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    for name, boxes in rectangles.items():
        axes.add_collection(PolyCollection(boxes, facecolors=COLOURS[name], edgecolors="none", antialiaseds=False))
    axes.text(1.005, -0.75, "idle", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9, color="#555555")
    return set(rectangles)


def _mark_steps(axes: Axes, timeline: Timeline, scale: float) -> None:
    """Draws a line at the begin of each step, and its number where it does not overlap the one before."""
    begin, end = timeline.window
    last = float("-inf")
    for step in timeline.steps:
        at = scale * (step.begin - begin)
        axes.axvline(at, color="#444444", linewidth=0.8, linestyle=(0, (3, 2)))
        if at - last > 0.06 * scale * (end - begin):
            axes.text(at, -0.65, f" step {step.number}", va="bottom", fontsize=9)
            last = at
    axes.axvline(scale * (timeline.steps[-1].end - begin), color="#444444", linewidth=0.8, linestyle=(0, (3, 2)))


def _colour_name(piece: Span) -> str:
    if piece.kind != COMPUTE:
        return piece.kind
    return next((name for name in COMPUTE_COLOURS if piece.name.startswith(name)), "other compute")


def table(timeline: Timeline) -> Table:
    """Each rank's shares of time by kind, in per cent."""
    begin, end = timeline.window
    kinds: list[Kind] = [kind for kind in KINDS if kind != HOST]
    hidden = max(0, len(timeline.lanes) - MAX_ROWS)
    result = Table(
        title=Text(printable(timeline.title)),
        caption=Text(printable(timeline.note + (f"; {hidden} more ranks in the trace" if hidden else ""))),
    )
    result.add_column("rank", justify="right")
    result.add_column("holds", no_wrap=True)
    for heading in (*kinds, "other"):
        result.add_column(heading, justify="right")
    for lane in timeline.lanes[:MAX_ROWS]:
        seconds = seconds_by_kind(lane, begin, end)
        shares = [seconds.get(kind, 0.0) / (end - begin) for kind in kinds]
        texts = (f"{share:.1%}" for share in (*shares, max(0.0, 1 - sum(shares))))
        result.add_row(str(lane.rank), Text(printable(lane.role)), *texts)
    return result
