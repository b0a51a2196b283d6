"""Decompressing text by its ending, `.gz` or `.zst`, with a bound on what it expands to."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, cast

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ENDINGS: Final = (".gz", ".zst")
DAMAGED: Final = (EOFError, zlib.error, zstd.ZstdError)
"""Errors of damaged bytes; those of gzip are an OSError without a number, too."""

MAX_EXPANSION: Final = 2_000
"""A compressed file of text grows by less: by 3 to 20 mostly, by 200 where all lines are alike."""
_EXPANSION_COUNTS_FROM = 1 << 30
_LARGEST_WINDOW: dict[int, int] = {
    zstd.DecompressionParameter.window_log_max: 31
}  # what `zstd --long=31` writes; 27 by default


@contextmanager
def decompressed(raw: BinaryIO, name: str, size: int) -> Iterator[BinaryIO]:
    """The content of a file or member with the `name`, of `size` bytes; `raw` itself where it is not compressed.

    Raises:
        EOFError: it is empty, ends too early, or a few bytes expand without an end; other errors of gzip and zstd.
    """
    if name.lower().endswith(".zst"):
        with zstd.ZstdFile(raw, options=_LARGEST_WINDOW) as stream:
            yield cast(BinaryIO, _BoundedExpansion(stream, size))
    elif name.lower().endswith(".gz"):
        if not size:
            raise EOFError("it is empty")  # to the gzip module this is no text, to gzip -t a broken file
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast(BinaryIO, _BoundedExpansion(stream, size))
    else:
        yield raw


class _BoundedExpansion:
    """The content of a compressed file of `size` bytes; an error where it expands without an end."""

    def __init__(self, stream: Any, size: int) -> None:
        self._stream = stream
        self._left = max(_EXPANSION_COUNTS_FROM, MAX_EXPANSION * size)

    def read(self, size: int) -> bytes:
        return self._counted(self._stream.read(size))

    def readline(self, size: int) -> bytes:
        return self._counted(self._stream.readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise EOFError(f"it expands to more than {MAX_EXPANSION:,} times its size, which no text does")
        return data
