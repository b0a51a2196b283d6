"""Parts of a page that a command writes between markers."""

import re
from pathlib import Path

from megadistill.errors import UserError


def put(page: Path, part: str, text: str) -> None:
    """Replaces the text between `<!-- PART: … -->` and `<!-- end of PART -->`.

    Raises:
        UserError: the page has no such markers, or has them twice.
    """
    old = page.read_text(encoding="utf-8")
    between = re.compile(rf"(<!-- {re.escape(part)}: [^\n]*-->\n).*?(<!-- end of {re.escape(part)} -->)", re.DOTALL)
    new, count = between.subn(lambda markers: f"{markers[1]}\n{text}\n\n{markers[2]}", old)
    if count != 1:
        raise UserError(f"{page} has {count} places for {part}: it needs one, between its two markers")
    page.write_text(new, encoding="utf-8")
