"""Reading a corpus: files to documents, one after the other.

| file                                                         | a document                                        |
|--------------------------------------------------------------|---------------------------------------------------|
| `.jsonl`, `.json.gz`, `.json.zst`, `.jsonl.gz`, `.jsonl.zst` | a line: an object with the text in one field      |
| `.parquet`, `.arrow` (Hugging Face `datasets`)               | a row: the text in one column                     |
| `.tar` (WebDataset)                                          | a `.txt` member, or a `.json` one (`tar_texts`)   |
| any other                                                    | the whole file; `.gz` and `.zst` are decompressed |

Memory holds one document, or one batch of rows, however long the file. What is left out is counted, with the place of
the first one, and files without any text are named; a damaged file is refused, since half a file is never a shorter
corpus.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Final

from megadistill.data.text.compressed import decompressed
from megadistill.data.text.file_errors import readable
from megadistill.data.text.json_text import FieldNames, text_of
from megadistill.data.text.left_out import MAX_DOCUMENT_BYTES, LeftOut, UnreadFile, in_words, listed
from megadistill.data.text.table_rows import arrow_rows, parquet_rows
from megadistill.data.text.tar_texts import tar_texts
from megadistill.errors import UserError
from megadistill.redaction import printable
from megadistill.units import readable as in_units

LINES: Final = (".jsonl", ".json.gz", ".json.zst", ".jsonl.gz", ".jsonl.zst")
"""Endings of files with a document a line; an uncompressed `.json` file is one document, which as many are."""
PARQUET: Final = ".parquet"
ARROW: Final = ".arrow"
TAR: Final = ".tar"
PACKED_TARS: Final = (".tar.gz", ".tgz", ".tar.zst")
"""Endings of tars that are refused: as one document they would be text with headers between."""
RECORDS: Final = (".json", ".csv", ".tsv")
"""Endings of files that may hold many records, though each is read as one document."""

NAMED_FILES: Final = 3
"""Files without any text that an error names."""

_DIGEST_BYTES = 8
_SKIP_BYTES = 1 << 20

_Text = tuple[int, int | str, bytes | LeftOut]
"""Bytes of the file up to this text, its line, row or place, and the text."""


@dataclass(frozen=True)
class Document:
    """A text that is valid UTF-8 and not blank."""

    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """Hash of the text: copies have the same, whatever file they lie in."""
        return hashlib.blake2b(self.data, digest_size=_DIGEST_BYTES).digest()

    @property
    def text(self) -> str:
        return self.data.decode()


class Corpus:
    """One pass over the documents of some files, in order."""

    def __init__(self, files: Iterable[Path], *, text_field: str) -> None:
        self._files = files
        self._text_field = text_field
        self.left_out: Counter[LeftOut] = Counter()
        self.first_places: dict[LeftOut, str] = {}
        """The first text that was left out for each reason, of files that have documents; blank ones aside."""
        self.unread: list[UnreadFile] = []
        """The files without any text, which are not blank."""
        self.whole: Counter[str] = Counter()
        """Files that were read as one document and may hold records, by their ending."""
        self.bytes_read = 0
        """Bytes of the files that were read, as they lie on the disk."""

    def __iter__(self) -> Iterator[Document]:
        """Raises UserError: a file cannot be read, or is damaged."""
        for path in self._files:
            before, left_out_before, documents = self.bytes_read, self.left_out.copy(), 0
            names, places = FieldNames(self._text_field), dict[LeftOut, int | str]()
            for read, place, text in self._texts(path, names):
                self.bytes_read = before + read
                document = text if isinstance(text, LeftOut) else _document(text)
                if isinstance(document, LeftOut):
                    self.left_out[document] += 1
                    places.setdefault(document, place)
                else:
                    documents += 1
                    yield document
            size, left_out = path.stat().st_size, self.left_out - left_out_before
            self.bytes_read = before + size
            if documents:
                for reason in places.keys() - {LeftOut.EMPTY}:
                    self.first_places.setdefault(reason, _place(path, places[reason]))
                if ending := _ending_of_records(path):
                    self.whole[ending] += 1
            elif left_out.keys() - {LeftOut.EMPTY}:
                self.unread.append(UnreadFile(path, size, left_out, names.all()))

    def no_documents(self) -> UserError:
        """The error for a corpus without a document, with what was left out."""
        fields = ", ".join(dict.fromkeys(field for file in self.unread for field in file.fields))
        way_out = f": the fields are {fields}, name one with --text-field" if fields else ": give other files"
        return UserError(f"no text to tokenize: {in_words(self.left_out) or 'the files hold no document'}{way_out}")

    def refuse_mostly_unread(self, total: int) -> None:
        """Raises UserError: more than half of the `total` bytes of the corpus lie in files without any text."""
        unread = sum(file.size for file in self.unread)
        if 2 * unread <= total:
            return
        raise UserError(
            f"no text in {in_units(unread, 'B')} of the {in_units(total, 'B')} of the input: "
            f"{'; '.join(listed(self.unread, NAMED_FILES))}: name the field of the text with --text-field, or leave "
            "the files out with --exclude, and start the command again (finished shards are reused)"
        )

    def _texts(self, path: Path, names: FieldNames) -> Iterator[_Text]:
        name = path.name.lower()
        if name.endswith(PACKED_TARS):
            raise UserError(f"{path} is a tar that is compressed as a whole: decompress it (`gunzip`, `unzstd`)")
        with readable(path):
            if name.endswith(PARQUET):
                yield from parquet_rows(path, names, self.left_out)
            elif name.endswith(ARROW):
                yield from arrow_rows(path, names, self.left_out)
            elif name.endswith(TAR):
                yield from tar_texts(path, names)
            else:
                size = path.stat().st_size
                with open(path, "rb") as raw, decompressed(raw, name, size) as stream:
                    if name.endswith(LINES):
                        yield from _objects(stream, raw, names)
                    else:
                        data = stream.read(MAX_DOCUMENT_BYTES + 1)
                        yield size, "", data if len(data) <= MAX_DOCUMENT_BYTES else LeftOut.TOO_LONG


def _place(path: Path, place: int | str) -> str:
    is_table = path.name.lower().endswith((PARQUET, ARROW))
    where = f"{'row' if is_table else 'line'} {place:,}" if isinstance(place, int) else place
    return f"{printable(str(path))}, {where}"


def _ending_of_records(path: Path) -> str | None:
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    return None if name.endswith(LINES) else next((ending for ending in RECORDS if plain.endswith(ending)), None)


def _document(data: bytes) -> Document | LeftOut:
    if len(data) > MAX_DOCUMENT_BYTES:
        return LeftOut.TOO_LONG
    try:
        return Document(data) if data.decode().strip() else LeftOut.EMPTY
    except UnicodeDecodeError:
        return LeftOut.INVALID


def _objects(stream: BinaryIO, raw: BinaryIO, names: FieldNames) -> Iterator[_Text]:
    for number, line in _lines(stream):
        yield raw.tell(), number, line if isinstance(line, LeftOut) else text_of(line, names)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | LeftOut]]:
    """Lines that are not blank, with their numbers. One above the bound is skipped without being held in memory."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) <= MAX_DOCUMENT_BYTES:
            if not line.isspace():
                yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_SKIP_BYTES)
        yield number, LeftOut.TOO_LONG
