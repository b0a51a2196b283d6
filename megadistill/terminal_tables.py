"""Tables on a terminal of any width, whose keys, names and numbers stay in one piece."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megadistill.redaction import printable, printable_lines

BREAK = re.compile(r"(?<=\s)(?=\S)")
BREAK_IN_NAME = re.compile(r"(?<=\s)(?=\S)|(?<=[/_=@])(?=\w)|(?<=[-.])(?=[^\W\d])")
"""Places where a line of a cell may end: between words; in a name that is too long, after a separator."""

MAX_CELL = 4000
"""Letters of a line of a cell."""

Rows: TypeAlias = list[list[Text]]


def print_tables(console: Console, *renderables: RenderableType) -> None:
    """Prints tables and texts, one after the other, an empty line between two."""
    for number, renderable in enumerate(renderables):
        if number:
            console.print()
        _print(console, renderable)


def _print(console: Console, renderable: RenderableType) -> None:
    if isinstance(renderable, Table):
        _print_table(console, renderable)
    elif isinstance(renderable, Group):
        for each in renderable.renderables:
            _print(console, each)
    elif isinstance(renderable, Padding):
        _print(console, renderable.renderable)
        for _ in range(renderable.bottom):
            console.print()
    elif isinstance(renderable, Text | str):
        console.print(_wrapped(_text(renderable), console.width, BREAK_IN_NAME), soft_wrap=True)
    else:
        console.print(renderable)


def _print_table(console: Console, table: Table) -> None:
    """Title, table, caption; a table that is too wide for its names even at their separators is a list instead."""
    title, caption = (_text(part) for part in (table.title, table.caption))
    table.title = table.caption = None
    if title.plain:
        title.stylize("table.title")
        _print(console, title)
    rows = [list(row) for row in zip(*(_cells(column.cells) for column in table.columns), strict=True)]
    headings = [_text(column.header) for column in table.columns]
    if not _fit(console, table, headings, rows):
        _print_list(console, headings, rows)
    else:
        console.print(table)
    if caption.plain:
        caption.stylize("table.caption")
        _print(console, caption)


def _fit(console: Console, table: Table, headings: Sequence[Text], rows: Rows) -> bool:
    """Sets widths that add up to the console's, and cells that are broken to fit them. False where there are none."""
    columns = range(len(headings))
    lines = [headings, *rows] if table.show_header else rows
    longest = [max((_longest(row[i], None) for row in lines), default=0) for i in columns]
    table.min_width = None
    for column in table.columns:
        column.min_width = column.ratio = None
    available = console.width - _frame(table)
    for breaks in (BREAK, BREAK_IN_NAME):
        least = [
            max((_longest(row[i], BREAK if row is headings else breaks) for row in lines), default=0) for i in columns
        ]
        if breaks is BREAK:  # a short cell is in one piece if the width allows it
            least = [longest[i] if table.columns[i].no_wrap else least[i] for i in columns]
        if sum(least) <= available:
            widths = _shared(available, least, longest)
            for i, column in enumerate(table.columns):
                column.width, column.no_wrap, column.overflow = widths[i], False, "fold"
                column.header = _wrapped(headings[i], widths[i], BREAK)
                column._cells = [_wrapped(row[i], widths[i], breaks) for row in rows]
            return True
    return False


def _frame(table: Table) -> int:
    """Columns that the frame and the padding take."""
    return table._extra_width + sum(table._get_padding_width(i) for i in range(len(table.columns)))


def _shared(available: int, least: Sequence[int], longest: Sequence[int]) -> list[int]:
    """A width for each column, from `least` to `longest`: a line at a time to the one that lacks most."""
    widths = list(least)
    for _ in range(available - sum(least)):
        lacking = max(range(len(widths)), key=lambda i: longest[i] - widths[i], default=None)
        if lacking is None or widths[lacking] >= longest[lacking]:
            break
        widths[lacking] += 1
    return widths


def _print_list(console: Console, headings: Sequence[Text], rows: Rows) -> None:
    """A row as lines `heading: cell`, the first cell as their title; a row of a name and a value as one line.

    The terminal breaks what is too long.
    """
    pairs = len(headings) == 2 and not any(heading.plain for heading in headings)
    for row in rows:
        if pairs:
            _print(console, row[0].append(": ").append_text(row[1]))
            continue
        for i, (heading, cell) in enumerate(zip(headings, row, strict=True)):
            if cell.plain:
                name = Text(f"{heading.plain}: " if heading.plain else "")
                _print(console, Text("  " if i else "").append_text(name if i else Text()).append_text(cell))


def _cells(cells: Iterable[RenderableType]) -> list[Text]:
    return [_text(cell) for cell in cells]


def _text(cell: RenderableType | None) -> Text:
    """A cell as text: a name in it is neither markup nor a control sequence."""
    text = cell.copy() if isinstance(cell, Text) else Text("" if cell is None else str(cell))
    if any(len(line) > MAX_CELL for line in text.plain.split("\n")):
        return Text(printable_lines(text.plain), style=text.style)
    text.plain = "\n".join(map(printable, text.plain.expandtabs(1).split("\n")))  # letter for letter: styles stay
    return text


def _longest(text: Text, breaks: re.Pattern[str] | None) -> int:
    """Columns of the longest line, or of the longest part between `breaks`."""
    lines = text.plain.split("\n")
    parts = lines if breaks is None else [part for line in lines for part in _parts(line, breaks)]
    return max(Text(part.rstrip()).cell_len for part in parts)


def _parts(line: str, breaks: re.Pattern[str]) -> list[str]:
    """The parts of a line between `breaks`, the first with the line's indentation."""
    first, *others = breaks.split(line.lstrip())
    return [line[: len(line) - len(line.lstrip())] + first, *others]


def _wrapped(text: Text, width: int, breaks: re.Pattern[str]) -> Text:
    """`text` with a line break wherever the next part does not fit; between words rather than inside a name."""
    lines = []
    for line in text.split("\n", allow_blank=True):
        offsets = list(_line_ends(line.plain, width, breaks))
        for piece in line.divide(offsets):
            piece.rstrip()
            lines.append(piece)
    joined = Text("\n", style=text.style, justify=text.justify).join(lines)
    joined.no_wrap, joined.overflow = text.no_wrap, text.overflow
    return joined


def _line_ends(line: str, width: int, breaks: re.Pattern[str]) -> Iterator[int]:
    """Offsets at which `line` is cut."""
    begin = 0
    places = [match.start() for match in breaks.finditer(line)]
    between_words = {match.start() for match in BREAK.finditer(line)}
    while Text(line[begin:].rstrip()).cell_len > width:
        ahead = [place for place in places if line[begin:place].strip()]
        fitting = [place for place in ahead if Text(line[begin:place].rstrip()).cell_len <= width]
        words = [place for place in fitting if place in between_words]
        if not ahead:
            return
        begin = (words or fitting or ahead[:1])[-1]
        yield begin
