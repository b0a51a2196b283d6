"""The measures of a model on held-out tokens, computed from the sums of an `Accumulator`.

Means are over tokens, in nats where no other unit is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadistill.heldout.accumulator import BINS, COLUMNS, Floats
from megadistill.heldout.splits import Split

LARGEST_CROSS_ENTROPY = 700.0
"""Nats a token above which the perplexity is that of this one: e to a larger power is no float."""


@dataclass(frozen=True)
class Measures:
    """One model on some tokens."""

    tokens: int
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    """None where a split's manifest has no count of bytes."""
    calibration_error: float
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599, section 3): the mean distance of confidence and
    accuracy over 21 bins, weighted by tokens."""
    kl: float | None
    """KL(teacher ‖ model); None without a teacher."""
    jsd: float | None
    """Jensen-Shannon divergence from the teacher, β = 0.5."""
    agreement: float | None
    """Fraction of positions where both have the same most likely token."""
    acceptance: float | None
    """Mean of Σ min(p, q): the fraction of the model's draws that speculative decoding with the teacher accepts."""


def measures_of(
    sums_C: Floats, bins_B3: Floats, splits: Sequence[Split], tokens: Sequence[float], *, with_teacher: bool
) -> dict[str, Any]:
    """The fields of `Measures`, from sums over all tokens of `splits`; there is at least one token.

    Args:
        sums_C: sums of `COLUMNS`.
        bins_B3: tokens, confidence and correct labels by bin of confidence.
        tokens: number of tokens of each of the splits.
    """
    assert (len(sums_C), len(bins_B3)) == (len(COLUMNS), BINS)
    count = sums_C[0]
    means = dict(zip(COLUMNS[1:], (sums_C[1:] / count).tolist(), strict=True))
    bytes_ = _text_bytes(splits, tokens)
    return {
        "tokens": int(count),
        "cross_entropy": means["cross_entropy"],
        "perplexity": math.exp(min(means["cross_entropy"], LARGEST_CROSS_ENTROPY)),
        "bits_per_byte": None if bytes_ is None else float(sums_C[1] / math.log(2) / bytes_),
        "calibration_error": float(np.abs(bins_B3[:, 1] - bins_B3[:, 2]).sum() / count),
        **{name: means[name] if with_teacher else None for name in ("kl", "jsd", "agreement", "acceptance")},
    }


def _text_bytes(splits: Sequence[Split], tokens: Sequence[float]) -> float | None:
    """Bytes of text of so many tokens of each split, at the mean of its manifest; None where one has no count."""
    bytes_ = 0.0
    for split, count in zip(splits, tokens, strict=True):
        if split.manifest.text_bytes is None:
            return None
        bytes_ += split.manifest.text_bytes * count / split.manifest.tokens
    return bytes_
