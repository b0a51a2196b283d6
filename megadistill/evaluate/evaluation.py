"""Results of an evaluation: records, their JSON file, and the columns of their tables.

Means are over tokens, in nats where no other unit is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megadistill.errors import UserError
from megadistill.heldout.measures import Measures
from megadistill.io import read_json
from megadistill.redaction import printable

MAX_MODELS, MAX_PARTS = 32, 1000
"""Bounds of a file, which anybody may have written: models, and bins, deciles or sources of a model."""


@dataclass(frozen=True)
class CalibrationBin:
    """The tokens to which a model gives a top-1 probability in one of 21 equal parts of [0, 1]."""

    count: int
    confidence: float | None
    """Mean top-1 probability; None where there is no token."""
    accuracy: float | None
    """Fraction of the tokens whose label was the most likely token."""


@dataclass(frozen=True)
class Decile:
    """One tenth of the tokens, from the lowest teacher entropy to the highest; None where it has no token."""

    bounds: tuple[float, float] | None
    """Lowest and highest teacher entropy."""
    tokens: int
    cross_entropy: float | None
    kl: float | None
    agreement: float | None


@dataclass(frozen=True)
class SourceResult(Measures):
    """One model on one of the splits."""

    source: str


@dataclass(frozen=True)
class Evaluation(Measures):
    """One model on all splits."""

    model: str
    parameters: int
    calibration: tuple[CalibrationBin, ...]
    by_decile: tuple[Decile, ...] | None
    """Results by decile of the teacher's entropy; None without a teacher."""
    by_source: tuple[SourceResult, ...]
    """One for each split, in the order in which they were given."""


MEASURES: Mapping[str, tuple[str, str]] = {
    "parameters": ("parameters", ",.0f"),
    "tokens": ("tokens", ",.0f"),
    "cross_entropy": ("CE", ".4f"),
    "perplexity": ("perplexity", ",.2f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "kl": ("KL", ".4f"),
    "jsd": ("JSD", ".4f"),
    "agreement": ("agree", ".1%"),
    "acceptance": ("acceptance", ".1%"),
    "calibration_error": ("calibration error", ".2%"),
}
"""Heading and format of each measure, in the order of a table's columns."""


def measure_cells(result: Measures, names: Sequence[str], *, missing: str = "-") -> list[str]:
    """The measures `names` of a result as text."""
    values = [(getattr(result, name, None), MEASURES[name][1]) for name in names]
    return [missing if value is None else format(value, form) for value, form in values]


def measure_rows(first: str, results: Sequence[tuple[str, Measures]], *, missing: str = "-") -> list[list[str]]:
    """A table of named results with the measures that any of them has: its heading, then a row for each."""
    names = [name for name in MEASURES if any(getattr(result, name, None) is not None for _, result in results)]
    rows = ([label, *measure_cells(result, names, missing=missing)] for label, result in results)
    return [[first, *(MEASURES[name][0] for name in names)], *rows]


_FILE = TypeAdapter(list[Evaluation], config=ConfigDict(allow_inf_nan=False))


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluations in a file of `megadistill evaluate --json`.

    Raises:
        UserError: there is no such file, or it holds no evaluations of this version.
    """
    location, way_out = printable(str(path)), "`megadistill evaluate --json FILE` writes one"
    try:
        results = _FILE.validate_python(read_json(path))
    except FileNotFoundError:
        raise UserError(f"no evaluation {location}: {way_out}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = printable(".".join(str(part) for part in first["loc"])) or "the file"
        reason = f"{key}: {first['msg'].lower()}"
        raise UserError(f"{location}: no evaluations of this version ({reason}); {way_out}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{location}: cannot be read as JSON ({printable(str(error))}); {way_out}") from None
    if not 0 < len(results) <= MAX_MODELS:
        raise UserError(f"{location}: evaluations of {len(results)} models, 1 to {MAX_MODELS} can be read; {way_out}")
    for result in results:
        most_parts = max(map(len, (result.calibration, result.by_decile or (), result.by_source)))
        if result.tokens < 1 or not result.calibration or most_parts > MAX_PARTS:
            raise UserError(
                f"{location}: {printable(result.model)} has no tokens, no calibration or more than {MAX_PARTS} parts: "
                f"not an evaluation; {way_out}"
            )
    return results
