"""Text and tables as Markdown.

Text from elsewhere is escaped, and a path or URL is cut to its last name: a page gives away no machine, no user and no
key of a URL.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megadistill.redaction import printable, without_secrets


def escape_md(text: object) -> str:
    """Text as one line of Markdown without effect: no markup, no HTML, no link."""
    line = printable(" ".join(without_secrets(str(text)).split()))
    return re.sub(r"([\\`*_\[\]<>#|~$&:@])", r"\\\1", line)


def basename(path: str) -> str:
    """The last name of a path or a URL, escaped."""
    return escape_md(Path(path.partition("?")[0]).name or "a folder")


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: int | None = None) -> str:
    """A table. The columns after the first `left` are aligned to the right; None: no column is."""
    rules = ["---" if left is None or column < left else "---:" for column in range(len(heading))]
    return "\n".join(
        [f"| {' | '.join(heading)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    )
