"""BOS in front of stored sequences that do not begin with it, put in when they are read.

A stored sequence t_0 … t_S becomes BOS, t_0 … t_(S-1): its labels are t_0 … t_(S-1), and t_S, the first token of the
next chunked sequence, is predicted there. One that begins with BOS stays as it is; where t_S is the first token of
another sequence, which predicts it behind its own BOS, it is no label here. So nothing is predicted twice.

Legend: N sequences, T = S + 1 tokens of a sequence, D documents of a sequence.
"""

import numpy as np
from numpy.typing import NDArray

from megadistill.data.shards.labels import Bounds
from megadistill.data.shards.manifest import Manifest, PackerRecord
from megadistill.data.shards.packing import BESTFIT
from megadistill.data.shards.reader import WHOLE_SHARD_BATCH, SequenceReader
from megadistill.data.shards.sequence_batch import SequenceBatch


def insert_bos(batch: SequenceBatch, bos: int, packer: PackerRecord) -> tuple[SequenceBatch, NDArray[np.bool_]]:
    """The sequences with `bos` in front, and [N]: True where the last label is predicted in another sequence.

    A BOS that is put in belongs to the document that goes on behind it. What already begins with BOS is left as it is.
    """
    tokens_NT, bounds = batch.tokens, batch.bounds
    if packer.sequence_bos:
        return batch, np.zeros(len(tokens_NT), dtype=np.bool_)
    begins_N = tokens_NT[:, 0] == bos
    shifted_NT = np.empty_like(tokens_NT)
    shifted_NT[:, 0], shifted_NT[:, 1:] = bos, tokens_NT[:, :-1]
    length = tokens_NT.shape[1]
    inserted = SequenceBatch(
        tokens=np.where(begins_N[:, None], tokens_NT, shifted_NT),
        bounds=[row if begins else _shifted(row, length) for row, begins in zip(bounds, begins_N, strict=True)],
        faults=batch.faults,
    )
    return inserted, begins_N & _goes_on(batch, packer)


def _shifted(bounds: Bounds, length: int) -> NDArray[np.int64]:
    """The bounds behind one token more in front, of which the last one falls off where there is no padding."""
    moved = np.minimum(bounds[1:] + 1, length)
    return np.concatenate(([0], moved[: len(moved) - 1][moved[:-1] < length], moved[-1:])).astype(np.int64)


def _goes_on(batch: SequenceBatch, packer: PackerRecord) -> NDArray[np.bool_]:
    """[N]: whether the last token is the first one of another sequence; of other programs' it is not known: True.

    Neighbours of chunked sequences share that token; with best-fit packing the pieces of a long document do, each of
    which but the last fills its sequence. Generated sequences share none.
    """
    if packer.name == "generated":
        return np.zeros(len(batch.tokens), dtype=np.bool_)
    if packer.name != BESTFIT:
        return np.ones(len(batch.tokens), dtype=np.bool_)
    whole = [0, batch.tokens.shape[1]]
    is_piece_N = np.array([row.tolist() == whole for row in batch.bounds], dtype=np.bool_)
    goes_on_N: NDArray[np.bool_] = is_piece_N & (batch.tokens[:, -1] != packer.eos)
    return goes_on_N


def beginnings(manifest: Manifest, bos: int) -> tuple[int, int]:
    """How many of the first sequences of a split begin with `bos`, and how many were looked at: those not damaged.

    A manifest that records it is believed: `shards verify` checks it. The others are of an earlier release, or of
    another program.
    """
    count = min(manifest.shards[0].sequences, WHOLE_SHARD_BATCH)
    if manifest.packer.sequence_bos and manifest.packer.bos == bos:
        return count, count
    places_N2 = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
    read = SequenceReader(manifest).read(places_N2)
    whole = [row for row in range(count) if row not in read.faults]
    return int((read.tokens[whole, 0] == bos).sum()), len(whole)
