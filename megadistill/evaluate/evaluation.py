"""What an evaluation found, as it lies in its JSON. It knows no models and no tables.

Means are over the tokens they are of, in nats unless they say otherwise.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class CalibrationBin:
    """The tokens to which a model gives a top-1 probability in one of 21 equal parts of [0, 1]."""

    count: int
    confidence: float | None
    """Mean top-1 probability; None where there is no token."""
    accuracy: float | None
    """Share of them whose label it was."""


@dataclass(frozen=True)
class Decile:
    """One tenth of the tokens, from the lowest teacher entropy to the highest; None where it has no token."""

    bounds: tuple[float, float] | None
    """The lowest and the highest teacher entropy in it."""
    tokens: int
    cross_entropy: float | None
    kl: float | None
    agreement: float | None


@dataclass(frozen=True)
class SourceResult:
    """One model on one of the splits; the fields are those of `Evaluation`."""

    source: str
    tokens: int
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    calibration_error: float
    kl: float | None
    jsd: float | None
    agreement: float | None
    acceptance: float | None


@dataclass(frozen=True)
class Evaluation:
    """One model on all splits."""

    model: str
    parameters: int
    tokens: int
    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    """None where a split does not say how many bytes of text it holds."""
    calibration_error: float
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599, section 3): the mean distance of confidence and
    accuracy over the bins of `calibration`, by their tokens."""
    kl: float | None
    """KL of the teacher against the model; None without a teacher."""
    jsd: float | None
    """Jensen-Shannon divergence from the teacher, β = 0.5."""
    agreement: float | None
    """Share of positions where both have the same most likely token."""
    acceptance: float | None
    """Mean of Σ min(p, q): the share of the model's draws that speculative decoding with the teacher accepts."""
    calibration: tuple[CalibrationBin, ...]
    by_decile: tuple[Decile, ...] | None
    """Ten, by the teacher's entropy; None without a teacher."""
    by_source: tuple[SourceResult, ...]
    """One for each split, in the order in which they were given."""


def write_json(results: Sequence[Evaluation], path: Path) -> None:
    """The evaluations as a JSON list, one object a model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps([asdict(result) for result in results], indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
