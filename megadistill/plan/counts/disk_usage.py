"""What a run writes: checkpoints, and targets that it stores. Arithmetic alone, by the formats of `train` and `data`.

Legend: S tokens of a sequence, M draws of a token, K ids kept of one.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache

from megadistill.config import TargetsSection
from megadistill.plan.counts.sharding import FLOAT32, Sharding

STATES = ("master", "exp_avg", "exp_avg_sq")
"""What a checkpoint has of each parameter, in float32."""
RNG_BYTES = 5056
"""Of torch's generator on a CPU."""
TAR_BLOCK = 512
NPY_HEADER = 128

DISTINCT_OF_50 = 12
"""Different ids in 50 draws from a language model's distribution (arXiv:2503.16870)."""


def checkpoint_bytes(run: Sharding) -> int:
    """All ranks' files of one checkpoint, to the byte where the ranks divide every parameter; else some bytes more, as
    the last pieces are counted whole. Its manifest is not counted: the recipe, a line for each file and parameter."""
    states = len(STATES) * FLOAT32 * sum(run.sizes)
    pieces = tuple(-(-size // run.ranks) for size in run.sizes)
    return states + run.ranks * (_header_bytes(tuple(run.student.shapes), pieces) + RNG_BYTES + FLOAT32)


@lru_cache(maxsize=256)
def _header_bytes(names: tuple[str, ...], pieces: tuple[int, ...]) -> int:
    """Of a rank's safetensors file: eight bytes, and its JSON filled up to a multiple of eight. Wide numbers come
    first."""
    held = {"optimizer_step": 1}
    for name, piece in zip(names, pieces, strict=True):
        held |= {f"{kind}/{name}": piece for kind in STATES}
    header, offset = {}, 0
    for name in sorted(held):
        offsets = [offset, offset + FLOAT32 * held[name]]
        header[name] = {"dtype": "F32", "shape": [held[name]], "data_offsets": offsets}
        offset = offsets[1]
    header["rng"] = {"dtype": "U8", "shape": [RNG_BYTES], "data_offsets": [offset, offset + RNG_BYTES]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8


@dataclass(frozen=True)
class TargetBytes:
    """Bytes a token of stored targets, with the tars that hold them."""

    expected: float
    """For draws, with as many different ids as were counted for language models; for `threshold` and `top_p`, whose
    number depends on the teacher, the most."""
    most: float


def target_bytes(targets: TargetsSection, *, vocab_size: int, sequence_length: int) -> TargetBytes:
    """Of `loss.targets`, whether the run stores them or not."""
    most = _most_kept(targets, vocab_size)
    expected = float(most)
    if targets.draws is not None:
        # Heaps' law through one id of one draw and the number that was counted.
        expected = min(most, targets.draws ** (math.log(DISTINCT_OF_50) / math.log(50)))
    return TargetBytes(
        bytes_with(targets, expected, vocab_size=vocab_size, sequence_length=sequence_length),
        bytes_with(targets, most, vocab_size=vocab_size, sequence_length=sequence_length),
    )


def bytes_with(targets: TargetsSection, kept: float, *, vocab_size: int, sequence_length: int) -> float:
    """Bytes a token where a token keeps `kept` ids on average: the members of `data.target_rows` in a tar."""
    S, most = sequence_length, _most_kept(targets, vocab_size)
    number = _bytes_of(vocab_size * (targets.draws or 1) - 1)
    members = [S * _power_of_two(_bytes_of(most)), S * kept * number]
    if targets.draws is None:
        members.append(S * kept * FLOAT32)
        if targets.tail != "renormalised":
            members.append(S * FLOAT32)
    return sum(TAR_BLOCK * (1 + math.ceil((NPY_HEADER + member) / TAR_BLOCK)) for member in members) / S


def _most_kept(targets: TargetsSection, vocab_size: int) -> int:
    """As `data.targets.TargetKey.most_kept`."""
    if targets.epsilon is not None:
        return min(math.floor(1 / targets.epsilon) + 1, vocab_size)
    return min(next(n for n in (targets.draws, targets.k, targets.max_ids) if n is not None), vocab_size)


def _bytes_of(largest: int) -> int:
    return max(1, -(-largest.bit_length() // 8))


def _power_of_two(width: int) -> int:
    """Of numpy's integers."""
    return 1 << (width - 1).bit_length()


def signal_bytes(*, vocab_size: int, width: int) -> dict[str, int]:
    """Bytes a token of what a teacher could send in bfloat16: all of its logits, or its last hidden states."""
    return {"logits": 2 * vocab_size, "hidden states": 2 * width}
