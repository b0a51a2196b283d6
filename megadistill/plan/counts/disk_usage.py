"""Bytes that a run writes: checkpoints, and the targets that it stores, by the formats of `train` and `data`.

Legend: S tokens of a sequence.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache

from megadistill.config.recipe import Recipe, TargetsSection
from megadistill.plan.counts.sharding import FLOAT32, Sharding
from megadistill.student.optimizer import state_bytes, state_kinds

RNG_BYTES = 5056
"""Bytes of the state of torch's generator on a CPU."""
LOCAL_SAVES = 3
"""Saves of the local tier on a node: two that stay, and the one that is written."""
TAR_BLOCK = 512
NPY_HEADER = 128

DISTINCT_OF_50 = 12
"""Different ids in 50 draws from a language model's distribution (arXiv:2503.16870)."""


def final_checkpoints(recipe: Recipe, *, first_step: int) -> int:
    """Checkpoints on the disk after the last step: the latest, those that `checkpoint.keep_every` keeps, and that of
    the last step before a decay.

    `first_step`: step of the checkpoint from which the run begins; 0: it starts.
    """
    steps, every, keep_every = recipe.train.steps, recipe.train.checkpoint_every, recipe.checkpoint.keep_every
    saved = range(first_step - first_step % every + every, steps + 1, every)
    stable = {recipe.stable_steps} - set(range(first_step + 1))
    last = sorted({steps, *stable, *saved[-recipe.checkpoint.keep_last :]})[-recipe.checkpoint.keep_last :]
    milestone = math.lcm(every, keep_every or every)
    milestones = range(milestone, last[0], milestone)[first_step // milestone :] if keep_every else range(0)
    return len({*last, *stable, *milestones})


def checkpoint_bytes(run: Sharding) -> int:
    """Bytes of all files of one checkpoint, without its manifest: one a shard, whatever the number of replicas.

    Exact where the ranks divide every parameter; else some bytes too many, as the last pieces are counted whole.
    """
    optimizer = run.recipe.train.optimizer
    states = state_bytes(optimizer) * sum(run.param_sizes)
    pieces = tuple(-(-size // run.shard) for size in run.param_sizes)
    header = _header_bytes(tuple(run.student.shapes), pieces, state_kinds(optimizer))
    return states + run.shard * (header + RNG_BYTES + FLOAT32)


def local_bytes(run: Sharding) -> int:
    """Bytes on a node's own disk or memory of the saves of `checkpoint.local`, with those of the node before.

    0 without a local tier. A world of one node has no copies.
    """
    if run.recipe.checkpoint.local is None:
        return 0
    files = min(run.ranks, run.ranks_per_node) * (1 if run.ranks <= run.ranks_per_node else 2)
    return LOCAL_SAVES * files * -(-checkpoint_bytes(run) // run.shard)


@lru_cache(maxsize=256)
def _header_bytes(names: tuple[str, ...], pieces: tuple[int, ...], states: tuple[str, ...]) -> int:
    """Bytes of the header of a rank's safetensors file: its length in eight bytes, and JSON padded to a multiple of
    eight. Tensors of wide numbers come first."""
    sizes = {"optimizer_step": 1}
    for name, piece in zip(names, pieces, strict=True):
        sizes |= {f"{state}/{name}": piece for state in states}
    header, offset = {}, 0
    for name in sorted(sizes):
        offsets = [offset, offset + FLOAT32 * sizes[name]]
        header[name] = {"dtype": "F32", "shape": [sizes[name]], "data_offsets": offsets}
        offset = offsets[1]
    header["rng"] = {"dtype": "U8", "shape": [RNG_BYTES], "data_offsets": [offset, offset + RNG_BYTES]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8


@dataclass(frozen=True)
class TargetBytes:
    """Bytes of a token's stored targets, with its share of the tars around them."""

    expected: float
    """Bytes for draws, with the number of different ids that was counted for language models; for `threshold` and
    `top_p`, whose number of ids depends on the teacher, the maximum."""
    most: float


def target_bytes(targets: TargetsSection, *, vocab_size: int, sequence_length: int) -> TargetBytes:
    """Bytes of a token's targets by `loss.targets`, whether the run stores them or not."""
    most = targets.max_ids_per_token(vocab_size)
    expected = float(most)
    if targets.draws is not None:
        # Heaps' law through one id of one draw and the published number for 50.
        expected = min(most, targets.draws ** (math.log(DISTINCT_OF_50) / math.log(50)))
    return TargetBytes(
        *(bytes_with(targets, ids, vocab_size=vocab_size, sequence_length=sequence_length) for ids in (expected, most))
    )


def bytes_with(targets: TargetsSection, ids: float, *, vocab_size: int, sequence_length: int) -> float:
    """Bytes of a token that has `ids` ids on average: the members of `data.targets.target_codec` in a tar."""
    S = sequence_length
    count_bytes = 1 << (_bytes_of(targets.max_ids_per_token(vocab_size)) - 1).bit_length()  # one of numpy's integers
    members = [S * count_bytes, S * ids * _bytes_of(vocab_size * (targets.draws or 1) - 1)]
    if targets.draws is None:
        members.append(S * ids * FLOAT32)
        if targets.tail not in ("renormalised", None):
            members.append(S * FLOAT32)
    return sum(TAR_BLOCK * (1 + math.ceil((NPY_HEADER + member) / TAR_BLOCK)) for member in members) / S


def _bytes_of(largest: int) -> int:
    return max(1, -(-largest.bit_length() // 8))


def signal_bytes(*, vocab_size: int, width: int) -> dict[str, int]:
    """Bytes of a teacher's output for a token in bfloat16: all of its logits, or its last hidden states."""
    return {"logits": 2 * vocab_size, "hidden states": 2 * width}
