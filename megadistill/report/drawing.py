"""A matplotlib figure as SVG for the page and as PNG beside it, in one style.

The SVG is written for a page: its colours are the page's variables, so that they follow a reader's light or dark
scheme; what belongs to a run has the class `run-N`, so that the page can hide it; its text is text. Each figure is
drawn twice, wide and narrow, of which the page shows the one whose text can be read.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megadistill.redaction import printable

# Okabe and Ito, "Color Universal Design" (2008), which colour-blind readers can distinguish; light, then dark schemes.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b88700", "#56b4e9", "#7a5195", "#6b6b6b")
PALETTE_DARK = ("#4aa8e0", "#ff8540", "#2ec79a", "#e59cc6", "#f0bf3a", "#8fd0f7", "#b794d6", "#a8a8a8")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5)))
MAX_RUNS = len(PALETTE) * len(DASHES)
"""Maximum runs of a chart: colours times dash styles."""

TEXT, GRID = "#1b1b1e", "#d9d9de"
WIDE, NARROW, HEIGHT = 5.6, 3.45, 3.0
"""Sizes of a figure in inches. On a phone of 390 pixels, text of 8.5 points in a narrow one is 11 pixels high."""
MAX_LABEL = 40
LEGEND_COLUMNS, LEGEND_LINE = 2, 0.18

STYLE = {
    "text.parse_math": False,  # names of runs are not formulas
    "text.usetex": False,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}  # fmt: skip

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Drawing:
    """A figure as SVG, wide and narrow, and as PNG."""

    name: str
    """Name of its PNG file, without the suffix."""
    title: str
    caption: str
    svg: str
    narrow_svg: str
    png: bytes


@contextmanager
def style() -> Iterator[None]:
    """The style of figures that are made and drawn inside; missing glyphs give no warning."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, *, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def colour(run: int) -> str:
    return PALETTE[run % len(PALETTE)]


def dashes(run: int) -> Any:
    """Dash style of a run: solid for the first ones, as many as there are colours."""
    return DASHES[run // len(PALETTE) % len(DASHES)]


def label(text: str, *, limit: int = MAX_LABEL) -> str:
    """A name for a figure: printable, and a long one without its begin."""
    text = printable(text)
    return text if len(text) <= limit else "…" + text[-limit + 1 :]


def draw(
    figure_of: Callable[[float], Figure], name: str, title: str, caption: str, *, runs: Sequence[str] = ()
) -> Drawing:
    """Draws a figure for the page, and for a file with its title, where the axes have none, and a legend of `runs`.

    `figure_of` makes the figure for a width in inches. The page has one legend for all figures.
    """
    figure = figure_of(WIDE)
    svg, narrow = _svg(figure, name, title), _svg(figure_of(NARROW), f"{name}-narrow", title)
    if not any(axes.get_title() or axes.get_title(loc="left") for axes in figure.axes):
        figure.axes[0].set_title(title, loc="left")
    if runs:
        _legend(figure, runs)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=160, facecolor="white")
    return Drawing(name=name, title=title, caption=caption, svg=svg, narrow_svg=narrow, png=picture.getvalue())


def _svg(figure: Figure, name: str, title: str) -> str:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids that differ from those of the page's other figures
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return for_page(buffer.getvalue(), title=title)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    handles = [Line2D([], [], linewidth=1.6, color=colour(i), linestyle=dashes(i)) for i in range(len(names))]
    lines = -(-len(names) // LEGEND_COLUMNS)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * lines)
    figure.legend(handles, [label(each) for each in names], loc="outside lower left", ncols=LEGEND_COLUMNS)


def for_page(svg: bytes, *, title: str) -> str:
    """matplotlib's SVG as an element of a page: classes of runs in place of ids, and the page's colours."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # a style would be the whole page's
                parent.remove(child)
    for element in root.iter():
        _adapt(element)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": title})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element) -> None:
    name = element.attrib.pop("id", None)
    if name is not None and re.fullmatch(r"run-\d+", name):
        element.set("class", name)
    elif name is not None and element.tag != f"{{{_SVG}}}g":  # targets of references: clips, markers, glyphs
        element.set("id", name)
    for key, value in element.attrib.items():
        if key == "d":
            element.set(key, re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", value))
        else:
            element.set(key, _page_colours(value))


def _page_colours(style: str) -> str:
    for index, shade in enumerate(PALETTE):
        style = style.replace(shade, f"var(--run-{index})")
    return style.replace(TEXT, "var(--text)").replace(GRID, "var(--grid)").replace("'DejaVu Sans'", "inherit")
