"""Packing: documents of any length to units of one length. Pure; it knows no files and no tokenizer.

Legend: S tokens of a sequence, L tokens of a document, D documents of a unit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

CHUNK: Final = "chunk"
BESTFIT: Final = "bestfit"
PACKER_VERSIONS: Final = {CHUNK: 2, BESTFIT: 1}
"""Raise one when the same documents would give other units."""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Unit:
    """What a shard stores: tokens [S + 1], and bounds [D + 1] (see `rows`)."""

    tokens: Ids
    bounds: NDArray[np.int32]
