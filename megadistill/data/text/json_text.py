"""The text of a JSON object, and the names of its fields where it has none."""

import json
from collections.abc import Iterable
from typing import Final

from megadistill.data.text.left_out import LeftOut

_FIELDS_NAMED: Final = 20


class FieldNames:
    """The first fields of the records of a file that have no text, for messages."""

    def __init__(self, text_field: str) -> None:
        self.text_field = text_field
        self._names: dict[str, None] = {}

    def remember(self, fields: Iterable[str], *, not_text: bool = False) -> None:
        """`not_text`: the text field is there, without text."""
        for field in fields:
            if len(self._names) < _FIELDS_NAMED:
                suffix = " (which is not text)" if not_text and field == self.text_field else ""
                self._names[f"{field[:100]!r}{suffix}"] = None

    def all(self) -> tuple[str, ...]:
        """The names in quotes, in the order in which they came."""
        return tuple(self._names)


def text_of(record: bytes, names: FieldNames) -> bytes | LeftOut:
    """The text in a JSON object, as UTF-8; the fields of an object without it go to `names`."""
    try:
        values = json.loads(record.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return LeftOut.INVALID
    except (ValueError, RecursionError):
        return LeftOut.NOT_JSON
    if not isinstance(values, dict):
        return LeftOut.NOT_JSON
    text = values.get(names.text_field)
    if not isinstance(text, str):
        names.remember(values, not_text=names.text_field in values)
        return LeftOut.NO_TEXT
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return LeftOut.INVALID
