"""The result of `tokenize`, as a table and as lines."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.table import Table

from megadistill.data.prepare.shard_tasks import TRAIN
from megadistill.data.shards.manifest import Manifest
from megadistill.data.text.left_out import LeftOut, UnreadFile, as_one_document, first_of, in_words, listed
from megadistill.units import readable, spell

MAX_UNREAD_LINES: Final = 10
"""Files of which nothing was read that are named; the others are counted."""


@dataclass(frozen=True)
class SplitReport:
    """The manifest of one split, and what its sequences leave out or add."""

    manifest: Manifest
    dropped: int | None = None
    """Tokens that are in no sequence: the rest at the end of a shard. None: not known, as manifests do not have it."""
    padding: int | None = None
    """Tokens of the sequences that belong to no document. None: not known."""

    def cells(self) -> dict[str, str]:
        """A column of a table, by the headings of the rows."""
        one, text_bytes = self.manifest, self.manifest.text_bytes or 0
        cells = {
            "documents": f"{one.documents:,}",
            "sequences": f"{one.sequences:,}",
            "shards": f"{len(one.shards):,}",
            "tokens": f"{one.tokens:,}",
            "text": readable(text_bytes, "B"),
            "bytes per token": f"{text_bytes / one.tokens:.2f}",
        }
        if self.padding is not None:
            cells["padding"] = f"{self.padding / (one.sequences * (one.sequence_length + 1)):.2%}"
        if self.dropped is not None:
            cells["tokens dropped"] = f"{self.dropped:,}"
        return cells


@dataclass(frozen=True)
class TokenizeReport:
    """The result of `tokenize`."""

    output: Path
    vocab_size: int
    train: SplitReport
    heldout: SplitReport | None
    input_bytes: int
    """Bytes of the files on the disk."""
    seconds: float
    left_out: Counter[LeftOut]
    first_places: Mapping[LeftOut, str] = field(default_factory=dict)
    """Place of the first text that was left out for each reason, of files that have documents."""
    unread: tuple[UnreadFile, ...] = ()
    """Files of the input that gave no document."""
    whole: Counter[str] = field(default_factory=Counter)
    """Files that were read as one document and may hold records, by their ending."""
    reused: int = 0
    """Shards that an earlier start had written."""
    already_there: bool = False
    """Whether an earlier start of the same command had finished; then nothing is known of what it left out."""

    def heading(self) -> str:
        """The line above the table."""
        vocabulary = f"vocabulary of {self.vocab_size:,} ids"
        if self.already_there:
            return f"{self.output}: already there, made by the same command; {vocabulary}"
        return f"{self.output}: {vocabulary}, {spell(self.seconds)}"

    def table(self) -> Table:
        """A column a split."""
        table = Table("")
        columns = {split.manifest.split: split.cells() for split in (self.train, self.heldout) if split}
        for split in columns:
            table.add_column(split, justify="right")
        for heading in columns[TRAIN]:
            table.add_row(heading, *(cells[heading] for cells in columns.values()))
        return table

    def notes(self) -> list[str]:
        """The lines below the table: documents that were left out, the largest files of which nothing was read."""
        if self.already_there:
            return ["nothing was written"]
        notes = [f"left out: {in_words(self.left_out) or 'nothing'}", *first_of(self.first_places)]
        if self.reused:
            notes.append(f"{self.reused:,} shards reused from an earlier start")
        if (line := as_one_document(self.whole)) is not None:
            notes.append(line)
        if self.unread:
            size = sum(file.size for file in self.unread)
            notes.append(
                f"no text in {readable(size, 'B')} of the {readable(self.input_bytes, 'B')} of the input; --text-field "
                "names the field with the text, --exclude leaves files out:"
            )
            notes += [f"  {line}" for line in listed(self.unread, MAX_UNREAD_LINES)]
        return notes
