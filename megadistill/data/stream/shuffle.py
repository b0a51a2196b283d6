"""The order of one source: position to (shard, sequence), a pure function of the shards' counts and a seed.

Nothing is stored or shuffled. An epoch numbers its sequences from a shift of its own, cuts them into blocks of BLOCK
neighbours, permutes the blocks, and permutes the sequences inside each window of WINDOW blocks. Reads stay near each
other, as if a buffer of 65,536 sequences were shuffled, and any position of any epoch is located in constant memory and
time. The sequences after the last whole block come last; the shift makes them other ones in each epoch.

The arithmetic is this module's own, because the streams of numpy's generators may change between versions (NEP 19);
tests/golden/order.json pins it.

Legend: N positions to locate, P shards.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 2
"""Part of every stream's fingerprint. Raise it when a golden vector moves: old checkpoints are then refused."""

BLOCK = 64
"""Neighbouring sequences that stay in one window."""
WINDOW = 1024
"""Blocks in one window, whose sequences are mixed."""
ROUNDS = 6

Words = NDArray[np.uint64]
Positions = NDArray[np.int64]


class SourceOrder:
    """The place of each position in a source's endless stream, for shards of `counts` [P] sequences.

    Epoch e is positions e·sequences to (e + 1)·sequences - 1, and visits every sequence once.
    """

    def __init__(self, counts: Positions | Sequence[int], *, seed: int, name: str) -> None:
        self._ends_P = np.cumsum(counts, dtype=np.int64)
        self._key = f"{seed}/{name}"
        self.sequences = int(self._ends_P[-1])
        self._blocks = self.sequences // BLOCK

    def locate(self, positions_N: Positions) -> Positions:
        """[N, 2] int64: the shard, and the sequence in that shard, at each position [N] int64."""
        sequences_N = self.sequence_at(positions_N)
        shards_N = np.searchsorted(self._ends_P, sequences_N, side="right")
        starts_N = np.where(shards_N > 0, self._ends_P[shards_N - 1], 0)
        return np.stack([shards_N, sequences_N - starts_N], axis=1)

    def sequence_at(self, positions_N: Positions) -> Positions:
        """[N] int64: the sequence at each position [N], numbered through all shards."""
        epochs_N, places_N = np.divmod(np.asarray(positions_N, dtype=np.int64), self.sequences)
        sequences_N = np.empty_like(places_N)
        for epoch in np.unique(epochs_N).tolist():
            here = epochs_N == epoch
            sequences_N[here] = self._in_epoch(epoch, places_N[here])
        return sequences_N

    def _in_epoch(self, epoch: int, places_N: Positions) -> Positions:
        whole = self._blocks * BLOCK
        sequences_N = np.empty_like(places_N)
        windows_N = np.where(places_N < whole, places_N // (BLOCK * WINDOW), -1)
        for window in np.unique(windows_N).tolist():
            here = windows_N == window
            if window < 0:
                size, keys = self.sequences - whole, _keys(self._key, epoch, "rest")
                sequences_N[here] = whole + permute(places_N[here] - whole, size=size, keys=keys)
            else:
                sequences_N[here] = self._in_window(epoch, window, places_N[here] - window * BLOCK * WINDOW)
        shift = int(_keys(self._key, epoch, "shift")[0]) % self.sequences
        return (sequences_N + shift) % self.sequences

    def _in_window(self, epoch: int, window: int, places_N: Positions) -> Positions:
        blocks = min(WINDOW, self._blocks - window * WINDOW)
        mixed_N = permute(places_N, size=blocks * BLOCK, keys=_keys(self._key, epoch, f"window {window}"))
        block_N, sequence_N = np.divmod(mixed_N, BLOCK)
        block_N = permute(window * WINDOW + block_N, size=self._blocks, keys=_keys(self._key, epoch, "blocks"))
        return block_N * BLOCK + sequence_N


def permute(places_N: Positions, *, size: int, keys: Words) -> Positions:
    """The images [N] of `places_N` under the permutation of range(size) that `keys` [ROUNDS] choose.

    A Feistel network permutes the smallest power of two that is not below `size`; a value that lands outside walks its
    cycle until it is inside again (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains"), under two
    applications on average.
    """
    bits = max(2, (size - 1).bit_length())
    values_N = _feistel(places_N.astype(np.uint64), bits, keys)
    outside_N = np.flatnonzero(values_N >= size)
    while len(outside_N):
        values_N[outside_N] = _feistel(values_N[outside_N], bits, keys)
        outside_N = outside_N[values_N[outside_N] >= size]
    return values_N.astype(np.int64)


def _feistel(values: Words, bits: int, keys: Words) -> Words:
    """Halves that differ by a bit where `bits` is odd; they change places each round, so the rounds are even."""
    low, high = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    masks = (np.uint64((1 << high) - 1), np.uint64((1 << low) - 1))
    for number, key in enumerate(keys):
        left, right = right, left ^ (_mix(right + key) & masks[number % 2])
    return (left << np.uint64(low)) | right


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014); uint64 arrays wrap, as it needs."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=256)
def _keys(key: str, epoch: int, use: str) -> Words:
    digest = hashlib.blake2b(f"order/{ORDER_VERSION}/{key}/{epoch}/{use}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
