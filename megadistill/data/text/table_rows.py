"""Texts in a column of a table: parquet files, and the Arrow files of Hugging Face `datasets`."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from megadistill.data.text.file_errors import damaged
from megadistill.data.text.json_text import FieldNames
from megadistill.data.text.left_out import MAX_DOCUMENT_BYTES, LeftOut
from megadistill.errors import UserError

_ROWS_AT_A_TIME: Final = 128
_FILE_MAGIC: Final = b"ARROW1"
_END_OF_STREAM: Final = b"\xff\xff\xff\xff\0\0\0\0"
_BINARY: Final = {
    "string": "binary", "large_string": "large_binary", "string_view": "binary_view",
    "binary": "binary", "large_binary": "large_binary", "binary_view": "binary_view",
}  # fmt: skip
"""Arrow types that hold text, bytes that a writer did not mark as strings among them -> the same without UTF-8."""

Row = tuple[int, int, bytes | LeftOut]
"""Bytes of the file up to this row, roughly; number of the row from 1; its text."""


def parquet_rows(path: Path, names: FieldNames, left_out: Counter[LeftOut]) -> Iterator[Row]:
    """The rows of a parquet file; those of one without the column are counted in `left_out`.

    Memory holds one batch of rows. Raises UserError: the file is damaged, or pyarrow is missing.
    """
    size, field = path.stat().st_size, names.text_field
    arrow = _pyarrow(path)
    try:
        with arrow.parquet.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        if not _has_text(schema, names, arrow):
            left_out[LeftOut.NO_TEXT] += metadata.num_rows
            return
        done = 0
        with arrow.parquet.ParquetFile(
            path,
            metadata=metadata,
            buffer_size=1 << 20,
            pre_buffer=False,
            page_checksum_verification=True,
            read_dictionary=[field],  # or a text that many rows share is copied for each of them
        ) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[field]):
                read = size * (done + len(batch)) // metadata.num_rows
                for number, text in enumerate(_texts(batch.column(0)), done + 1):
                    yield read, number, text
                done += len(batch)
    except (arrow.ArrowException, UnicodeDecodeError) as error:  # the last: a name of a column that is not UTF-8
        raise damaged(path, error) from None


def arrow_rows(path: Path, names: FieldNames, left_out: Counter[LeftOut]) -> Iterator[Row]:
    """The rows of an Arrow file in either form: a stream, which `datasets` writes, or a file with a footer.

    The file is mapped; texts are copied one at a time. Rows of a file without the column are counted in `left_out`.

    Raises:
        UserError: the file is damaged or cut off, or pyarrow is missing.
    """
    arrow = _pyarrow(path)
    size = path.stat().st_size
    if not size:
        raise damaged(path, "it is empty")
    try:
        with arrow.memory_map(str(path)) as source:
            done = 0
            for read, schema, batch in _batches(path, source, size, arrow):
                batch.validate()
                if not _has_text(schema, names, arrow):
                    left_out[LeftOut.NO_TEXT] += batch.num_rows
                    continue
                column = _checked(batch.column(schema.get_field_index(names.text_field)), arrow)
                for number, text in enumerate(_texts(column), done + 1):
                    yield read, number, text
                done += batch.num_rows
    except (arrow.ArrowException, UnicodeDecodeError) as error:  # the last: a name of a column that is not UTF-8
        raise damaged(path, error) from None


def _batches(path: Path, source: Any, size: int, arrow: Any) -> Iterator[tuple[int, Any, Any]]:
    """Bytes read, the schema and a batch of rows, for each batch. A stream must end with its end mark."""
    is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    source.seek(0)
    if is_file:
        file = arrow.ipc.open_file(source)
        for number in range(file.num_record_batches):
            yield size * (number + 1) // file.num_record_batches, file.schema, file.get_batch(number)
        return
    stream = arrow.ipc.open_stream(source)
    for batch in stream:
        yield source.tell(), stream.schema, batch
    end = source.tell()
    source.seek(max(0, end - len(_END_OF_STREAM)))
    if end != size or source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise damaged(path, f"the end of its rows was expected at byte {end} of {size}")


def _checked(column: Any, arrow: Any) -> Any:
    """The same texts as bytes, with offsets that were looked at: those of a damaged file may lie outside of it."""
    if arrow.types.is_dictionary(column.type):
        column = arrow.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary, arrow))
    else:
        column = column.view(getattr(arrow, _BINARY[str(column.type)])())
    column.validate(full=True)
    return column


def _texts(column: Any) -> Iterator[bytes | LeftOut]:
    """The texts of a column, one at a time; lengths are looked at before anything is copied."""
    values: Iterable[Any] = column
    if hasattr(column, "dictionary"):
        texts = column.dictionary
        values = (texts[place.as_py()] if place.is_valid else None for place in column.indices)
    for text in values:
        if text is None or not text.is_valid:
            yield LeftOut.NO_TEXT
            continue
        buffer = text.as_buffer()
        yield LeftOut.TOO_LONG if buffer.size > MAX_DOCUMENT_BYTES else buffer.to_pybytes()


def _has_text(schema: Any, names: FieldNames, arrow: Any) -> bool:
    """Whether the text field is a column of text; if not, the columns go to `names`."""
    place = schema.get_field_index(names.text_field)
    if place >= 0:
        kind = schema.field(place).type
        if str(kind.value_type if arrow.types.is_dictionary(kind) else kind) in _BINARY:
            return True
    names.remember(schema.names, not_text=place >= 0)
    return False


def _pyarrow(path: Path) -> Any:
    """pyarrow with the modules that are used here: an extra."""
    try:
        import pyarrow.ipc  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UserError(f"{path}: reading it needs pyarrow: pip install 'megadistill[parquet]'") from None
    return pyarrow
