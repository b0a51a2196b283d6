"""Parts of a page that a command writes: tables, between markers. It knows nothing of what is in them."""

import re
from collections.abc import Sequence
from pathlib import Path

from megadistill.errors import UserError


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """The first `left` columns are set to the left, the others to the right."""
    rules = ["---" if i < left else "---:" for i in range(len(heading))]
    return "\n".join(
        [f"| {' | '.join(heading)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def put(page: Path, part: str, text: str) -> None:
    """Writes `text` between `<!-- PART: … -->` and `<!-- end of PART -->`, in place of what is there.

    Raises:
        UserError: the page has no such markers, or has them twice.
    """
    old = page.read_text(encoding="utf-8")
    between = re.compile(rf"(<!-- {re.escape(part)}: [^\n]*-->\n).*?(<!-- end of {re.escape(part)} -->)", re.DOTALL)
    new, count = between.subn(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", old)
    if count != 1:
        raise UserError(f"{page} has {count} places for {part}: it needs one, between its two markers")
    page.write_text(new, encoding="utf-8")
