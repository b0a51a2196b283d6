"""Texts in WebDataset tars, and in tars of text files.

A sample is the members whose names differ in the suffix alone. Each `.txt` member is a document; where a sample has
none, its `.json` is one, an object with the text in one field. Either may be compressed by itself (`.gz`, `.zst`).
Other members, such as pictures and classes, are not read.
"""

import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final

from megadistill.data.shards.tar import Sample, member_of, samples
from megadistill.data.text.compressed import ENDINGS, decompressed
from megadistill.data.text.file_errors import damaged, readable
from megadistill.data.text.json_text import FieldNames, text_of
from megadistill.data.text.left_out import MAX_DOCUMENT_BYTES, LeftOut
from megadistill.io import open_regular
from megadistill.redaction import printable

_TEXT: Final = "txt"
_RECORD: Final = "json"


def tar_texts(path: Path, names: FieldNames) -> Iterator[tuple[int, str, bytes | LeftOut]]:
    """For each document: bytes of the tar up to the end of its sample, the sample's place, and the text.

    Memory holds one member. A sample without a text is one record without it; its members' suffixes go to `names`.

    Raises:
        UserError: the tar or a compressed member is damaged, or a text is no plain file.
    """
    any_sample = False
    with open_regular(path) as file:
        for sample in samples(path):
            any_sample = True
            place = f"sample {printable(sample.key[:200])!r} at byte {sample.start}"
            texts, records = _suffixes(sample, _TEXT), _suffixes(sample, _RECORD)
            for suffix in texts or records[:1]:
                content = _content(path, file, member_of(sample, suffix, f"{path} {place}"), place)
                if not texts and not isinstance(content, LeftOut):
                    content = text_of(content, names)
                yield sample.stop, place, content
            if not texts and not records:
                names.remember(sample.members)
                yield sample.stop, place, LeftOut.NO_TEXT
    if not any_sample:
        yield path.stat().st_size, "which has no member with a suffix", LeftOut.NO_TEXT


def _suffixes(sample: Sample, ending: str) -> list[str]:
    """The suffixes of a sample that end in `ending`, compressed or not."""
    endings = tuple(f".{ending}{compression}" for compression in ("", *ENDINGS))
    return [suffix for suffix in sample.members if f".{suffix}".endswith(endings)]


def _content(path: Path, file: BinaryIO, member: tarfile.TarInfo, place: str) -> bytes | LeftOut:
    """The content of a member, decompressed. Sizes are input: nothing above the bound of a document is read."""
    if member.size > MAX_DOCUMENT_BYTES:
        return LeftOut.TOO_LONG
    file.seek(member.offset_data)
    content = file.read(member.size)
    where = f"{place}, its member {printable(member.name[-200:])!r}"
    if len(content) != member.size:
        raise damaged(path, f"{len(content)} of {member.size} bytes are there", where)
    with readable(path, where), decompressed(BytesIO(content), member.name, member.size) as stream:
        text = stream.read(MAX_DOCUMENT_BYTES + 1)
    return text if len(text) <= MAX_DOCUMENT_BYTES else LeftOut.TOO_LONG
