"""Sequences that were read, a row each, with their documents and faults.

Legend: N sequences, T = S + 1 tokens of a sequence, D documents of a sequence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.labels import predicted
from megadistill.data.shards.opening import ShardFault

Places = NDArray[np.int64]
"""[N, 2]: shard, and sequence in it."""
Tokens = NDArray[np.unsignedinteger[Any]]
"""[N, T]"""


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences, a row each. A row that is a fault has tokens of zero and one document."""

    tokens: Tokens
    """[N, T], in the manifest's dtype."""
    bounds: list[NDArray[np.int64]]
    """N arrays [D + 1], see `labels`; [0, T] where the manifest records none."""
    faults: dict[int, ShardFault]
    """Row -> the fault of its sequence."""

    def predicted_tokens(self, *, across_documents: bool) -> int:
        """Number of labels that are predicted without document masks."""
        length = self.tokens.shape[1] - 1
        return int(predicted(self.bounds, sequence_length=length, across_documents=across_documents).sum())


def by_shard(places_N2: Places) -> dict[int, dict[int, int]]:
    """Shard -> row of a batch -> the sequence of that row in the shard."""
    shards: dict[int, dict[int, int]] = {}
    for row, (number, sequence) in enumerate(places_N2.tolist()):
        shards.setdefault(number, {})[row] = sequence
    return shards


def with_faults(tokens_NT: Tokens, bounds: list[NDArray[np.int64]], faults: dict[int, ShardFault]) -> SequenceBatch:
    """The batch, with the rows that are faults blanked; in place."""
    for row in faults:
        tokens_NT[row] = 0
        bounds[row] = np.array([0, tokens_NT.shape[1]])
    return SequenceBatch(tokens_NT, bounds, faults)


def ids_below(vocab_size: int, id: Any) -> str:
    """A message: the ids that were expected, and the one found."""
    return f"expected ids from 0 to {vocab_size - 1}, found {id}"
