"""A format of token files: which files a path of the command line means, and what the headers of each tell.

Legend: G segments of a file, D documents of a file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.manifest import DecoderRecord, StoredDtype, TokenFormatName
from megadistill.data.storage.base import Folder
from megadistill.errors import UserError

MIN_PAIRS: Final = 64
"""Pairs of ids that tell whether their type is twice as wide."""
WIDEST: Final = 8
"""Bytes of the widest ids."""


@dataclass(frozen=True)
class ScanOptions:
    """Options that a scan may need besides the file."""

    vocab_size: int
    """Number of ids of the tokenizer."""
    dtype: str | None = None
    """dtype of ids without a header, where the user gives it."""
    column: str | None = None
    """Column or field with the ids, where the user gives it."""


@dataclass(frozen=True)
class TokenScan:
    """Places of the ids of one file and of its documents, from headers alone: no id is read."""

    dtype: StoredDtype
    """dtype of the ids as stored, little-endian, or as the decoder gives them."""
    segments_G2: NDArray[np.int64]
    """[G, 2]: the byte where a segment begins, and its number of ids; with a decoder the number of a part instead of
    the byte. Their order is the order of the ids."""
    starts_D: NDArray[np.int64] | None
    """[D]: places in the file's stream of ids where documents begin, climbing; None: the format does not tell, the ids
    do (EOS)."""
    decoder: DecoderRecord | None = None
    """How the ids of a part are decoded; None: they lie in the file as they are."""


Stored = tuple[StoredDtype, DecoderRecord | None]
"""dtype and decoder of the ids of a file."""


@dataclass(frozen=True)
class TokenFormat:
    """One format that `shards index` reads in place."""

    name: TokenFormatName
    files: Callable[[str], list[str]]
    """The data files that an argument of the command means, as paths. Raises UserError: there are none."""
    scan: Callable[[Folder, str, ScanOptions], TokenScan]
    """The scan of the file of a name in a folder. Raises UserError: corrupt, truncated or not of this format; one
    line that begins with the file's path and ends with the way out."""
    stored: Callable[[Folder, str, ScanOptions], Stored] | None = None
    """dtype and decoder of a file, where a scan reads more than its header. Raises UserError as a scan does."""

    def stored_as(self, folder: Folder, name: str, options: ScanOptions) -> Stored:
        """dtype and decoder of the file of a name in a folder. Raises UserError as a scan does."""
        if self.stored is not None:
            return self.stored(folder, name, options)
        scan = self.scan(folder, name, options)
        return scan.dtype, scan.decoder


Ids = NDArray[np.integer[Any]]


def refuse_halves(ids: Ids, dtype: str, vocab_size: int, where: str) -> None:
    """Raises UserError: `ids`, read as unsigned, are halves of wider ones, every second one an upper half.

    Of a type that no file tells: a wrong one would give ids of the tokenizer, and another text.
    """
    pairs, itemsize = len(ids) // 2, ids.dtype.itemsize
    if itemsize == WIDEST or pairs < MIN_PAIRS or ids[1 : 2 * pairs : 2].max() > (vocab_size - 1) >> (8 * itemsize):
        return
    wider = "uint32" if dtype == "uint16" else "int64"
    raise UserError(f"{where}: every second {dtype} is the upper half of an id: give --dtype {wider}")
