"""Tables with a column of ids: which column it is, and the scan of a file whose rows are documents.

Legend: R rows of a file, G segments of it.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenScan
from megadistill.data.shards.manifest import DecoderRecord, StoredDtype
from megadistill.errors import UserError

USUAL: Final = ("input_ids", "tokens")
"""Names of the column without --column: those of transformers' tokenizers, and of LLM Foundry."""
NAMED: Final = 20
"""Columns that an error names."""


def id_column(names: Sequence[str], given: str | None, where: str) -> int:
    """The place in `names` of the column with the ids: the `given` one, or one with a usual name.

    Raises:
        UserError: there is none, or several; one line.
    """
    accepted = USUAL if given is None else (given,)
    places = [place for place, name in enumerate(names) if name in accepted]
    if len(places) != 1:
        what = " or ".join(repr(name[:80]) for name in accepted)
        problem = f"no column {what}" if not places else f"{len(places)} columns {what}"
        raise UserError(f"{where} has {problem}: give --column, one of {listed(names)}")
    return places[0]


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message of one line."""
    return ", ".join(repr(name[:80]) for name in names[:NAMED]) + (", …" if len(names) > NAMED else "")


def scan_of_rows(
    dtype: StoredDtype,
    segments_G2: NDArray[np.int64],
    counts_R: NDArray[np.int64],
    decoder: DecoderRecord | None = None,
) -> TokenScan:
    """The scan of a file whose rows have `counts_R` ids, one row behind the other in the segments.

    A row is a document. Rows of one length are pieces of a text that was packed before, as LLM Foundry's of S ids: the
    ids tell then where its documents begin.
    """
    counts_R = counts_R[counts_R > 0]
    is_packed = len(counts_R) > 1 and bool((counts_R == counts_R[0]).all())
    starts_D = None if is_packed else np.append(0, np.cumsum(counts_R)[:-1])[: len(counts_R)]
    segments_G2 = segments_G2[segments_G2[:, 1] > 0]
    if decoder is None and len(segments_G2):
        begins_G, counts_G = segments_G2.T
        first_G = np.append(True, begins_G[1:] != (begins_G + counts_G * np.dtype(dtype).itemsize)[:-1])
        segments_G2 = np.stack([begins_G[first_G], np.add.reduceat(counts_G, np.flatnonzero(first_G))], axis=1)
    return TokenScan(dtype, segments_G2, starts_D, decoder)


def refuse_dtype(options: ScanOptions, where: str) -> None:
    """Raises UserError: --dtype is given for a file that tells the type of its ids."""
    if options.dtype is not None:
        raise UserError(f"--dtype {options.dtype}: {where} tells the type of its ids: leave it out")
