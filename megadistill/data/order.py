"""The order of the stream: slot to (shard, unit), a pure function. It knows counts and a seed, no files, no batches.

Nothing is stored or shuffled: each epoch permutes its units with a Feistel network keyed by (seed, epoch), so that any
slot of any epoch is found in constant memory and time. The arithmetic is this module's own, because the streams of
numpy's generators may change between versions (NEP 19); tests/golden/order.json holds it still.

Legend: N slots asked for, P shards.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
"""Part of every stream's fingerprint. Raise it when a golden vector moves: old checkpoints are then refused."""

ROUNDS = 6

Words = NDArray[np.uint64]
Positions = NDArray[np.int64]


class Order:
    """Where the unit of each slot lies, for shards of `counts` [P] units.

    Epoch e is slots e·units to (e + 1)·units - 1, and visits every unit once.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._ends_P = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._seed = seed
        self.units = int(self._ends_P[-1])

    def locate(self, slots_N: Positions) -> Positions:
        """[N, 2] int64: the shard, and the unit in that shard, of each slot [N] int64."""
        units_N = self.unit_of(slots_N)
        shards_N = np.searchsorted(self._ends_P, units_N, side="right")
        starts_N = np.concatenate([[0], self._ends_P])[shards_N]
        return np.stack([shards_N, units_N - starts_N], axis=1)

    def unit_of(self, slots_N: Positions) -> Positions:
        """[N] int64: the unit of each slot [N], numbered through all shards."""
        epochs_N, places_N = np.divmod(np.asarray(slots_N, dtype=np.int64), self.units)
        units_N = np.empty_like(places_N)
        for epoch in np.unique(epochs_N).tolist():
            here = epochs_N == epoch
            units_N[here] = permute(places_N[here], size=self.units, keys=_epoch_keys(self._seed, epoch))
        return units_N


def permute(places_N: Positions, *, size: int, keys: Words) -> Positions:
    """The images [N] of `places_N` under the permutation of range(size) that `keys` [ROUNDS] choose.

    A balanced Feistel network permutes the smallest 4^h that is not below `size`; a value that lands outside walks its
    cycle until it is inside again (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains"), under four
    applications on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values_N = _feistel(places_N.astype(np.uint64), half_bits, keys)
    outside_N = values_N >= size
    while outside_N.any():
        values_N[outside_N] = _feistel(values_N[outside_N], half_bits, keys)
        outside_N = values_N >= size
    return values_N.astype(np.int64)


def _feistel(values: Words, half_bits: int, keys: Words) -> Words:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014); uint64 arrays wrap, as it wants."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _epoch_keys(seed: int, epoch: int) -> Words:
    digest = hashlib.blake2b(f"order/{ORDER_VERSION}/{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
