"""Words for the parts of a corpus that are left out: documents by the reason, files that gave none."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from megadistill.redaction import printable
from megadistill.units import readable

MAX_DOCUMENT_BYTES: Final = 1 << 26
"""A tokenizer takes 50 times a document's size in memory, in each worker: 3 GB for the longest."""


class LeftOut(StrEnum):
    """Reasons for leaving a document out of the data set; the value names several of them."""

    EMPTY = "empty documents"
    INVALID = "documents that are not UTF-8"
    NOT_JSON = "lines that are not a JSON object"
    NO_TEXT = "records without the text field"
    TOO_LONG = f"documents longer than {MAX_DOCUMENT_BYTES >> 20} MiB"

    def counted(self, number: int) -> str:
        """`1 empty document`, `3 lines that are not a JSON object`."""
        if number != 1:
            return f"{number:,} {self.value}"
        singular = re.sub(r"^(.*?)s\b", r"\1", self.value, count=1).replace("that are", "that is")
        return f"1 {singular}"


@dataclass(frozen=True)
class UnreadFile:
    """A file of the input that gave no document, though it is not blank."""

    path: Path
    size: int
    """Bytes on the disk."""
    left_out: Counter[LeftOut]
    fields: tuple[str, ...]
    """Columns, or keys of its records, in quotes, where the text field was not among them or held no text."""

    def __str__(self) -> str:
        if self.fields:
            reason = f"its fields are {', '.join(self.fields)}"
        elif self.left_out.keys() == {LeftOut.INVALID}:
            reason = "it is not UTF-8: no text, or in another encoding (iconv -f ENCODING -t UTF-8 converts it)"
        elif self.left_out.keys() == {LeftOut.TOO_LONG}:
            reason = f"{in_words(self.left_out)} (`split -C 16m` cuts a file of lines into shorter ones)"
        else:
            reason = in_words(self.left_out)
        return f"{printable(str(self.path))} ({readable(self.size, 'B')}): {reason}"


def in_words(left_out: Counter[LeftOut]) -> str:
    """`"2 empty documents, 1 document that is not UTF-8"`; an empty string where nothing was left out."""
    return ", ".join(reason.counted(left_out[reason]) for reason in LeftOut if left_out[reason])


def first_of(places: Mapping[LeftOut, str]) -> list[str]:
    """A line for each reason with the place of the first text that was left out for it."""
    return [f"  the first of the {reason.value}: {places[reason]}" for reason in LeftOut if reason in places]


def as_one_document(whole: Counter[str]) -> str | None:
    """One line on files of records, by their ending, that were each read as one document; None: there are none."""
    if not whole:
        return None
    files = ", ".join(f"{number:,} *{ending}" for ending, number in whole.items())
    return (
        f"{files}: each file is one document as it is, with its quotes and names of fields; for a document a record "
        f"convert it to .jsonl, or leave it out with --exclude '*{next(iter(whole))}'"
    )


def listed(files: Sequence[UnreadFile], most: int) -> list[str]:
    """The largest files, `most` of them, and a line that counts the others."""
    largest = sorted(files, key=lambda file: -file.size)
    others = largest[most:]
    plural = "" if len(others) == 1 else "s"
    more = [f"{len(others):,} more file{plural} ({readable(sum(file.size for file in others), 'B')})"] if others else []
    return [*map(str, largest[:most]), *more]
