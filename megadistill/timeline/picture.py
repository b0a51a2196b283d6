"""Room `timeline`: timelines as a picture, a row a rank, and as a table of shares. It reads no files.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; what does not compute is pale.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table
from rich.text import Text

from megadistill.timeline.spans import COMPUTE, HOST, KINDS, Kind, Lane, Span, Timeline, pieces, seconds_by_kind

MOST_ROWS = 64
"""Rows of a picture, and of a table: what stands behind them is in the trace."""

# By the begin of a span's name, where it computes; else by its kind.
COMPUTING = {
    "teacher": "#009E73",
    "student forward": "#56B4E9",
    "loss": "#CC79A7",
    "student backward": "#0072B2",
    "optimizer step": "#003A5C",
    "other compute": "#7F7F7F",
}
OTHERWISE: dict[str, str] = {
    "wait": "#E3E3E3",
    "send": "#E69F00",
    "data": "#F0E442",
    "save": "#D55E00",
    "host": "#B5A99A",
}
COLOURS = {**COMPUTING, **OTHERWISE}


def draw(timelines: Sequence[Timeline], path: Path) -> None:
    """One picture (PNG), one below the other, on one scale of time."""
    rows = [min(MOST_ROWS, len(timeline.lanes)) for timeline in timelines]
    height = 0.6 + sum(1.1 + 0.28 * each for each in rows)
    figure = Figure(figsize=(12, height), dpi=110, layout="constrained")
    panels = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=[each + 2.5 for each in rows])
    windows = [timeline.window for timeline in timelines]
    longest = max(end - begin for begin, end in windows)
    scale, unit = (1.0, "s") if longest >= 20 else (1e3, "ms")
    used: set[str] = set()
    for axes, timeline in zip(panels[:, 0], timelines, strict=True):
        used |= _panel(axes, timeline, scale, unit, longest)
    shown = [name for name in COLOURS if name in used]
    patches = [Patch(facecolor=COLOURS[name], edgecolor="#999999", linewidth=0.4, label=name) for name in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(shown), 11), frameon=False, fontsize=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder may have a name for which the font has no letters
        figure.savefig(path)


def _panel(axes: Axes, timeline: Timeline, scale: float, unit: str, longest: float) -> set[str]:
    """Draws one timeline; the names of what is in it."""
    begin, end = timeline.window
    lanes = timeline.lanes[:MOST_ROWS]
    rectangles: dict[str, list[list[tuple[float, float]]]] = {}
    for row, lane in enumerate(lanes):
        for piece in pieces(lane.spans, begin, end):
            left, right = (scale * (edge - begin) for edge in (piece.begin, piece.end))
            top, bottom = row - 0.4, row + 0.4
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            rectangles.setdefault(_colour(piece), []).append(corners)
        share = f"{_idle(lane, begin, end):.0%}"
        axes.text(1.005, row, share, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    for name, boxes in rectangles.items():
        axes.add_collection(PolyCollection(boxes, facecolors=COLOURS[name], edgecolors="none", antialiaseds=False))
    axes.text(1.005, -0.75, "idle", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9, color="#555555")
    _mark_steps(axes, timeline, scale, begin, longest)
    hidden = len(timeline.lanes) - len(lanes)
    title = timeline.title + (f" (the first {len(lanes)} of {len(timeline.lanes)} ranks)" if hidden else "")
    axes.set_title(_plain(f"{title}\n"), loc="left", fontsize=11, parse_math=False)
    axes.set_xlabel(_plain(f"time in {unit}; {timeline.note}"), fontsize=9, parse_math=False)
    axes.set_yticks(
        range(len(lanes)), [_plain(f"{lane.rank}  {lane.role}") for lane in lanes], fontsize=9, parse_math=False
    )
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, scale * longest)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return set(rectangles)


def _mark_steps(axes: Axes, timeline: Timeline, scale: float, begin: float, longest: float) -> None:
    """A line at each step's begin, and its number where there is room for it."""
    last = float("-inf")
    for step in timeline.steps:
        at = scale * (step.begin - begin)
        axes.axvline(at, color="#444444", linewidth=0.8, linestyle=(0, (3, 2)))
        if at - last > 0.06 * scale * longest:
            axes.text(at, -0.65, f" step {step.number}", va="bottom", fontsize=9)
            last = at
    axes.axvline(scale * (timeline.steps[-1].end - begin), color="#444444", linewidth=0.8, linestyle=(0, (3, 2)))


def _colour(piece: Span) -> str:
    """The name of it."""
    if piece.kind != COMPUTE:
        return piece.kind
    return next((name for name in COMPUTING if piece.name.startswith(name)), "other compute")


def _idle(lane: Lane, begin: float, end: float) -> float:
    """The share of the time in which a rank does no work of the models."""
    return 1 - seconds_by_kind(lane, begin, end).get(COMPUTE, 0.0) / (end - begin) if end > begin else 0.0


def table(timeline: Timeline) -> Table:
    """What each rank does with its time, in per cent."""
    begin, end = timeline.window
    kinds: list[Kind] = list(KINDS)
    hidden = max(0, len(timeline.lanes) - MOST_ROWS)
    shown = Table(
        title=Text(_plain(timeline.title)),
        caption=Text(_plain(timeline.note + (f"; {hidden} more ranks in the trace" if hidden else ""))),
    )
    shown.add_column("rank", justify="right")
    shown.add_column("holds", no_wrap=True)
    for heading in (*(kind for kind in kinds if kind != HOST), "other"):
        shown.add_column(heading, justify="right")
    for lane in timeline.lanes[:MOST_ROWS]:
        spent = seconds_by_kind(lane, begin, end)
        shares = [spent.get(kind, 0.0) / (end - begin) for kind in kinds if kind != HOST]
        texts = (f"{100 * share:.1f}" for share in (*shares, max(0.0, 1 - sum(shares))))
        shown.add_row(str(lane.rank), Text(_plain(lane.role)), *texts)
    return shown


def _plain(text: str) -> str:
    """Of files from elsewhere, without what a terminal would take for an order."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
