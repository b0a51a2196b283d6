"""Encoding the targets of one slot as the members of a sample, and decoding those, which are untrusted bytes.

`num_ids.npy` [S] holds the number of ids of each position. The ids follow in the other members, position after
position, in little-endian numbers of as few whole bytes w as the largest needs, as rows of w bytes:

    draws:      `codes.npy` [n, w] uint8, the numbers id·draws + count - 1: 3 bytes for 50 draws of up to 335,544 ids
    otherwise:  `ids.npy` [n, w] uint8 and `probs.npy` [n] float32; `log_tail.npy` [S] float32 where there is a tail

Counts are exact, and probabilities are float32 as in a run with a live teacher, so both learn the same.

Legend: S tokens of a sequence, K ids of a position, n ids of all positions, w bytes of a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.npy import MemberError, npy_header_of
from megadistill.data.targets.target_manifest import TargetKey
from megadistill.types import Tail

NUM_IDS: Final = "num_ids.npy"
CODES: Final = "codes.npy"
IDS: Final = "ids.npy"
PROBS: Final = "probs.npy"
LOG_TAIL: Final = "log_tail.npy"

Members = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TargetRow:
    """The targets of one slot: num_ids [S] int64, ids [n] int64, probs [n] float32, log_tail [S] float32."""

    num_ids: NDArray[np.int64]
    ids: NDArray[np.int64]
    probs: NDArray[np.float32]
    log_tail: NDArray[np.float32]


class TargetCodec:
    """Encoder and decoder of the slots of one target set."""

    def __init__(self, key: TargetKey) -> None:
        self._sequence = key.sequence_length
        self._vocab_size = key.vocab_size
        self._max_ids = key.max_ids_per_token
        self._draws = key.targets.draws
        self._has_tail = key.tail is not Tail.RENORMALISED
        self._num_ids_dtype = np.min_scalar_type(self._max_ids).newbyteorder("<")
        largest = key.vocab_size * (self._draws or 1) - 1
        self._width = -(-largest.bit_length() // 8)

    @property
    def members(self) -> tuple[str, ...]:
        """Suffixes of the members of a sample."""
        if self._draws is not None:
            return NUM_IDS, CODES
        return (NUM_IDS, IDS, PROBS, LOG_TAIL) if self._has_tail else (NUM_IDS, IDS, PROBS)

    def encode(self, ids_SK: NDArray[np.int64], probs_SK: NDArray[np.float32], log_tail_S: NDArray[Any]) -> Members:
        """The members of one slot, by suffix.

        Raises:
            ValueError: they are not targets of this key.
        """
        valid_SK = ids_SK >= 0
        num_ids_S, ids_n, probs_n = valid_SK.sum(axis=1), ids_SK[valid_SK], probs_SK[valid_SK]
        if ids_SK.max(initial=-1) >= self._vocab_size or num_ids_S.max() > self._max_ids:
            raise ValueError(f"ids up to {ids_SK.max()}, {num_ids_S.max()} of a token: not targets of this key")
        members: Members = {NUM_IDS: num_ids_S.astype(self._num_ids_dtype)}
        if self._draws is None:
            members |= {IDS: _narrow(ids_n, self._width), PROBS: probs_n.astype("<f4")}
            return members | ({LOG_TAIL: log_tail_S.astype("<f4")} if self._has_tail else {})
        counts_n = np.rint(probs_n.astype(np.float64) * self._draws).astype(np.int64)
        if not np.array_equal(_shares(counts_n, self._draws), probs_n):
            raise ValueError(f"targets that are not counts of {self._draws} draws")
        return members | {CODES: _narrow(ids_n * self._draws + counts_n - 1, self._width)}

    def decode(self, members: Mapping[str, memoryview]) -> TargetRow:
        """The targets in the bytes of the members.

        Raises:
            MemberError: they hold something else.
        """
        num_ids_S = _array(members[NUM_IDS], (self._sequence,), self._num_ids_dtype, NUM_IDS).astype(np.int64)
        if num_ids_S.max() > self._max_ids:
            raise MemberError(f"expected at most {self._max_ids} ids a token, found {num_ids_S.max()}")
        n = int(num_ids_S.sum())
        log_tail_S: NDArray[np.float32] = np.full(self._sequence, -np.inf, dtype=np.float32)
        if self._draws is not None:
            ids_n, counts_n = np.divmod(self._numbers(members[CODES], n, CODES), self._draws)
            self._require_draws(num_ids_S, counts_n + 1)
            probs_n = _shares(counts_n + 1, self._draws)
        else:
            ids_n = self._numbers(members[IDS], n, IDS)
            probs_n = _array(members[PROBS], (n,), np.dtype("<f4"), PROBS)
            if self._has_tail:
                log_tail_S = _array(members[LOG_TAIL], (self._sequence,), np.dtype("<f4"), LOG_TAIL)
        if ids_n.max(initial=0) >= self._vocab_size:
            raise MemberError(f"expected ids below {self._vocab_size}, found {ids_n.max()}")
        if not ((probs_n >= 0) & (probs_n <= 1)).all():
            raise MemberError("expected probabilities from 0 to 1, found others")
        if not (log_tail_S < np.float32(1e-3)).all():  # a rounded logarithm of 1 may lie a little above 0
            raise MemberError("expected logarithms of probabilities in the tail, found others")
        return TargetRow(num_ids_S, ids_n, probs_n, log_tail_S)

    def _numbers(self, data: memoryview, n: int, name: str) -> NDArray[np.int64]:
        return _wide(_array(data, (n, self._width), np.dtype("u1"), name))

    def _require_draws(self, num_ids_S: NDArray[np.int64], counts_n: NDArray[np.int64]) -> None:
        totals_S = np.bincount(np.repeat(np.arange(self._sequence), num_ids_S), counts_n, minlength=self._sequence)
        if not (totals_S == self._draws).all():
            position = int((totals_S != self._draws).argmax())
            raise MemberError(f"expected {self._draws} draws of token {position}, found {int(totals_S[position])}")


def _shares(counts_n: NDArray[np.int64], draws: int) -> NDArray[np.float32]:
    """The division of a run with a live teacher."""
    return (counts_n.astype(np.float64) / draws).astype(np.float32)


def _narrow(numbers_n: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """[n, w]."""
    return np.ascontiguousarray(numbers_n.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width])


def _wide(bytes_nw: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[n]."""
    numbers_n8 = np.zeros((len(bytes_nw), 8), dtype=np.uint8)
    numbers_n8[:, : bytes_nw.shape[1]] = bytes_nw
    return numbers_n8.view("<i8").reshape(-1).astype(np.int64, copy=False)


def _array(data: memoryview, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """The array of a member that begins with exactly the bytes that numpy writes for it; not copied."""
    header = npy_header_of(shape, dtype.str)
    expected = len(header) + int(np.prod(shape)) * dtype.itemsize
    if len(data) != expected or data[: len(header)] != header:
        raise MemberError(
            f"expected {name} to be an .npy of {shape} {dtype.str} in {expected} bytes, found {len(data)} other bytes"
        )
    return np.frombuffer(data, dtype=dtype, offset=len(header)).reshape(shape)
