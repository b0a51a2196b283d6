"""Room `report`: what `megadistill evaluate` found, from its JSON, as tables and figures. It runs no model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megadistill.errors import UserError
from megadistill.report.drawing import Drawing, colour, dashes, draw, new_figure
from megadistill.report.folder import Floats, number, printable, read_json
from megadistill.report.tables import Table, digits, text

MOST_MODELS = 32
MOST_PARTS = 1000

COLUMNS = {
    "parameters": ("parameters", ",.0f"),
    "tokens": ("tokens", ",.0f"),
    "cross_entropy": ("CE", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "kl": ("KL", ".4f"),
    "jsd": ("JSD", ".4f"),
    "agreement": ("agreement", ".1%"),
    "acceptance": ("acceptance", ".1%"),
    "calibration_error": ("calibration error", ".2%"),
}


@dataclass(frozen=True)
class Results:
    """One file of evaluations: a mapping a model, as it was written."""

    name: str
    models: Sequence[Mapping[str, Any]]

    def table(self) -> Table:
        return _table("model", [(text(each["model"]), each) for each in self.models])

    def by_source(self) -> Table | None:
        """None where there was one source alone."""
        parts = [
            (f"{text(each['model'])}: {text(part.get('source'))}", part)
            for each in self.models
            for part in _parts(each, "by_source")
        ]
        return _table("model: source", parts) if len(parts) > len(self.models) else None


def read_results(path: Path, *, name: str) -> Results:
    """Raises UserError: the file is none that `megadistill evaluate --json` writes."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"no evaluation {printable(str(path))}: `megadistill evaluate --json FILE` writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read as JSON: {printable(str(error))}") from None
    models = values if isinstance(values, list) else []
    if not models or not all(isinstance(each, dict) and isinstance(each.get("model"), str) for each in models):
        raise UserError(
            f"{printable(str(path))}: not a list of evaluations, as `megadistill evaluate --json` writes it"
        )
    return Results(name=printable(name), models=models[:MOST_MODELS])


def results_figures(results: Results, prefix: str) -> list[Drawing]:
    """Calibration, and KL and cross-entropy by decile of teacher entropy, where they were measured."""
    return [each for each in (_calibration(results, prefix), _deciles(results, prefix)) if each is not None]


def _calibration(results: Results, prefix: str) -> Drawing | None:
    figure, axes = new_figure(height=3.6)
    axes.plot([0, 1], [0, 1], color="#8a8a90", linewidth=0.8)
    shown: list[str] = []
    for model in results.models:
        confidence, accuracy = (_column(model, "calibration", name) for name in ("confidence", "accuracy"))
        known = np.isfinite(confidence) & np.isfinite(accuracy)
        if known.any():
            _line(axes, len(shown), confidence[known], accuracy[known])
            shown.append(text(model["model"]))
    if not shown:
        return None
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    caption = "Confidence: the most likely token's probability; a mean over each of its 21 parts. Grey: calibrated."
    return draw(figure, f"{prefix}-calibration", "Calibration", caption, models=shown)


def _deciles(results: Results, prefix: str) -> Drawing | None:
    figure, axes = new_figure()
    shown: list[str] = []
    for model in results.models:
        kl = _column(model, "by_decile", "kl")
        if np.isfinite(kl).any():
            places = np.arange(1, len(kl) + 1, dtype=np.float64)
            _line(axes, len(shown), places, kl)
            shown.append(text(model["model"]))
    if not shown:
        return None
    axes.set(xlabel="tenth of the tokens, by teacher entropy: 1 the surest", ylabel="KL, nats a token", ylim=(0, None))
    return draw(figure, f"{prefix}-deciles", "KL where the teacher is sure, and where not", "", models=shown)


def _line(axes: Axes, index: int, x: Floats, y: Floats) -> None:
    style: dict[str, Any] = {"color": colour(index), "linestyle": dashes(index)}
    axes.plot(x, y, marker=".", linewidth=1.3, **style)


def _parts(model: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The bins, tenths or sources of a model; none where it was not measured so."""
    parts = model.get(name)
    return [part for part in parts[:MOST_PARTS] if isinstance(part, dict)] if isinstance(parts, list) else []


def _column(model: Mapping[str, Any], name: str, field: str) -> Floats:
    return np.array([number(part.get(field)) for part in _parts(model, name)], dtype=np.float64)


def _table(heading: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row a name, with the columns that any of them has."""
    known = [key for key in COLUMNS if any(math.isfinite(number(values.get(key))) for _, values in rows)]
    return Table(
        [heading, *(COLUMNS[key][0] for key in known)],
        [[name, *(digits(number(values.get(key)), COLUMNS[key][1]) for key in known)] for name, values in rows],
    )
