"""Reading a corpus: files to documents, one after the other.

| file                                          | a document                                          |
|-----------------------------------------------|-----------------------------------------------------|
| `.jsonl`, `.json.gz`, `.json.zst`, `.jsonl.gz`, `.jsonl.zst` | a line: an object with the text in one field |
| `.parquet`                                    | a row: the text in one column                       |
| any other                                     | the whole file; `.gz` and `.zst` are decompressed   |

Memory holds one document, or one batch of rows, however long the file. What is left out is counted, and files without
any text are named; a damaged file is refused, since half a file is never a shorter corpus.
"""

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from megadistill.data.prepare.left_out import MAX_DOCUMENT_BYTES, LeftOut, UnreadFile, in_words, listed
from megadistill.errors import UserError
from megadistill.redaction import printable
from megadistill.units import readable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LINES: Final = (".jsonl", ".json.gz", ".json.zst", ".jsonl.gz", ".jsonl.zst")
"""Endings of files with a document a line; an uncompressed `.json` file is one document, which as many are."""
PARQUET: Final = ".parquet"
RECORDS: Final = (".json", ".csv", ".tsv")
"""Endings of files that may hold many records, though each is read as one document."""

NAMED_FILES: Final = 3
"""Files without any text that an error names."""

_DIGEST_BYTES = 8
_ROWS_AT_A_TIME = 128
MAX_EXPANSION: Final = 2_000
"""A compressed file of text grows by less: by 3 to 20 mostly, by 200 where all lines are alike."""
_EXPANSION_COUNTS_FROM = 1 << 30
_FIELDS_NAMED = 20
_SKIP_BYTES = 1 << 20
_LARGEST_WINDOW: dict[int, int] = {
    zstd.DecompressionParameter.window_log_max: 31
}  # what `zstd --long=31` writes; 27 by default
_DAMAGED = (EOFError, zlib.error, zstd.ZstdError)


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
        self._fields: dict[str, None] = {}
        self.left_out: Counter[LeftOut] = Counter()
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
            self._fields.clear()
            for text in self._texts(path):
                document = text if isinstance(text, LeftOut) else _document(text)
                if isinstance(document, LeftOut):
                    self.left_out[document] += 1
                else:
                    documents += 1
                    yield document
            size, left_out = path.stat().st_size, self.left_out - left_out_before
            self.bytes_read = before + size
            if documents and (ending := _ending_of_records(path)):
                self.whole[ending] += 1
            if not documents and left_out.keys() - {LeftOut.EMPTY}:
                self.unread.append(UnreadFile(path, size, left_out, tuple(self._fields)))

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
            f"no text in {readable(unread, 'B')} of the {readable(total, 'B')} of the input: "
            f"{'; '.join(listed(self.unread, NAMED_FILES))}: name the field of the text with --text-field, or leave "
            "the files out with --exclude, and start the command again (finished shards are reused)"
        )

    def _texts(self, path: Path) -> Iterator[bytes | LeftOut]:
        name = path.name.lower()
        with _readable(path):
            if name.endswith(PARQUET):
                yield from self._rows(path)
                return
            with open(path, "rb") as raw, _decompressed(raw, path) as stream:
                if name.endswith(LINES):
                    yield from self._objects(stream, raw)
                else:
                    data = stream.read(MAX_DOCUMENT_BYTES + 1)
                    yield data if len(data) <= MAX_DOCUMENT_BYTES else LeftOut.TOO_LONG

    def _objects(self, stream: BinaryIO, raw: BinaryIO) -> Iterator[bytes | LeftOut]:
        before = self.bytes_read
        for line in _lines(stream):
            self.bytes_read = before + raw.tell()
            yield line if isinstance(line, LeftOut) else self._text_of(line)

    def _text_of(self, line: bytes) -> bytes | LeftOut:
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return LeftOut.INVALID
        except (ValueError, RecursionError):
            return LeftOut.NOT_JSON
        if not isinstance(values, dict):
            return LeftOut.NOT_JSON
        text = values.get(self._text_field)
        if not isinstance(text, str):
            self._remember(values, not_text=self._text_field in values)
            return LeftOut.NO_TEXT
        try:
            return text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
            return LeftOut.INVALID

    def _rows(self, path: Path) -> Iterator[bytes | LeftOut]:
        before, size = self.bytes_read, path.stat().st_size
        parquet, arrow = _parquet(path)
        try:
            with parquet.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
            column = schema.get_field_index(self._text_field)
            if column < 0 or not _is_text(schema.field(column).type, arrow.types):
                self._remember(schema.names, not_text=column >= 0)
                self.left_out[LeftOut.NO_TEXT] += metadata.num_rows
                return
            done = 0
            with parquet.ParquetFile(
                path,
                metadata=metadata,
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=[self._text_field],  # or a text that many rows share is copied for each of them
            ) as file:
                for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[self._text_field]):
                    done += len(batch)
                    self.bytes_read = before + size * done // metadata.num_rows
                    yield from _values(batch.column(0), arrow)
        except arrow.ArrowException as error:
            raise _damaged(path, error) from None

    def _remember(self, fields: Iterable[str], *, not_text: bool = False) -> None:
        """Keeps the names of fields for messages; `not_text`: the text field is there, without text."""
        for field in fields:
            if len(self._fields) < _FIELDS_NAMED:
                suffix = " (which is not text)" if not_text and field == self._text_field else ""
                self._fields[f"{field[:100]!r}{suffix}"] = None


def find_files(
    inputs: Sequence[Path], include: Sequence[str], exclude: Sequence[str], *, output: Path
) -> Iterator[Path]:
    """Files as they are given, and those of folders in sorted order, without following symbolic links.

    `output`, which may lie inside of a folder, is left out.

    A folder's files are read that match a pattern of `include` and none of `exclude`. A pattern matches the
    path relative to the folder (`*` crosses `/`), the same with a leading `/`, or the file's name.

    Raises:
        UserError: an input does not exist, a folder cannot be read, or nothing matches.
    """
    any_file = False
    for given in inputs:
        _check_input(given)
        for path in [given] if given.is_file() else _walk(given, include, exclude, output.resolve()):
            any_file = True
            yield path
    names = ", ".join(map(str, inputs))
    if not any_file and tuple(include) == ("*",) and not exclude:
        raise UserError(f"there is no file in {names}: give files of text, or folders of them")
    if not any_file:
        raise UserError(
            f"no file of {names} matches --include {' '.join(include)}"
            f"{f' and not --exclude {chr(32).join(exclude)}' if exclude else ''}: change the patterns"
        )


def _check_input(given: Path) -> None:
    """Raises UserError: there is nothing at the path, or neither a file nor a folder."""
    if not given.exists():
        is_pattern = any(letter in given.name for letter in "*?[")
        problem = "matches no file" if is_pattern else "does not exist"
        raise UserError(f"{printable(str(given))} {problem}: give files of text, or folders of them")
    if not given.is_file() and not given.is_dir():
        raise UserError(f"{printable(str(given))} is neither a file nor a folder (a text is read more than once)")


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str], output: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in sorted(folders) if Path(parent, name).resolve() != output]
        for name in sorted(names):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            chosen = _matches(relative, include) and not _matches(relative, exclude)
            if chosen and path.is_file() and not path.is_symlink():
                yield path


def _matches(relative: str, patterns: Iterable[str]) -> bool:
    forms = (relative, f"/{relative}", relative.rpartition("/")[2])
    return any(fnmatchcase(form, pattern) for pattern in patterns for form in forms)


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


def _lines(stream: BinaryIO) -> Iterator[bytes | LeftOut]:
    """Lines that are not blank. One above the bound is skipped without being held in memory."""
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        if len(line) <= MAX_DOCUMENT_BYTES:
            if not line.isspace():
                yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_SKIP_BYTES)
        yield LeftOut.TOO_LONG


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # gzip and pyarrow, for bad bytes
            raise _damaged(path, error) from None
        raise _unreadable(path, error) from None


@contextmanager
def _decompressed(raw: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    if path.suffix.lower() == ".zst":
        with zstd.ZstdFile(raw, options=_LARGEST_WINDOW) as stream:
            yield cast(BinaryIO, _BoundedExpansion(stream, raw))
    elif path.suffix.lower() == ".gz":
        if not os.fstat(raw.fileno()).st_size:
            raise EOFError("it is empty")  # to the gzip module this is no text, to gzip -t a broken file
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast(BinaryIO, _BoundedExpansion(stream, raw))
    else:
        yield raw


class _BoundedExpansion:
    """The content of a compressed file, which ends with an error where a few bytes expand without an end."""

    def __init__(self, stream: Any, raw: BinaryIO) -> None:
        self._stream = stream
        self._left = max(_EXPANSION_COUNTS_FROM, MAX_EXPANSION * os.fstat(raw.fileno()).st_size)

    def read(self, size: int) -> bytes:
        return self._counted(self._stream.read(size))

    def readline(self, size: int) -> bytes:
        return self._counted(self._stream.readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise EOFError(f"it expands to more than {MAX_EXPANSION:,} times its size, which no text does")
        return data


def _unreadable(path: Path | str, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): make it readable, or --exclude it")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or cut off ({' '.join(str(error).split())}): copy it again, or --exclude it")


def _parquet(path: Path) -> tuple[Any, Any]:
    """pyarrow.parquet and pyarrow, an extra."""
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'megadistill[parquet]'") from None
    return pyarrow.parquet, pyarrow


def _values(column: Any, arrow: Any) -> Iterator[bytes | LeftOut]:
    """The texts of a column of a batch, one at a time; lengths are looked at before anything is copied."""
    if not arrow.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    texts = column.dictionary
    for place in column.indices.to_pylist():
        text = None if place is None else texts[place]
        if text is None or not text.is_valid:
            yield LeftOut.NO_TEXT
            continue
        buffer = text.as_buffer()
        yield LeftOut.TOO_LONG if buffer.size > MAX_DOCUMENT_BYTES else buffer.to_pybytes()


def _is_text(kind: Any, types: Any) -> bool:
    """Whether an Arrow type holds strings, or bytes that a writer did not mark as strings."""
    value = kind.value_type if types.is_dictionary(kind) else kind
    names = ("string", "large_string", "string_view", "binary", "large_binary")
    return any(getattr(types, f"is_{name}")(value) for name in names)
