"""Room `export`: text and tables as Markdown. It knows no run.

Text from elsewhere is escaped, and of a path the last name alone is shown: a card gives away no machine, no user, and
no key of a URL.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from megadistill.redaction import without_secrets

Rows = dict[str, str | None]
"""What it is -> the value, as Markdown; None: the row is left out."""


def plain(text: object) -> str:
    """Text as one line of Markdown that shows it and does nothing: no markup, no HTML, no link."""
    line = " ".join(without_secrets(str(text)).split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return re.sub(r"([\\`*_\[\]<>#|~$&:@])", r"\\\1", line)


def last_name(path: str) -> str:
    """Of a path or a URL."""
    return plain(Path(path.partition("?")[0]).name or "a folder")


def table_of(rows: Rows) -> str:
    """A row each, without a heading."""
    return table([["", ""], *([name, value] for name, value in rows.items() if value is not None)])


def table(lines: Iterable[list[str]]) -> str:
    """The first line is the heading."""
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rest])
