"""Room `report`: what `megadistill evaluate` found, from its JSON, as tables and figures. It runs no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megadistill.errors import UserError
from megadistill.evaluate.evaluation import Evaluation, SourceResult
from megadistill.report.drawing import Drawing, draw
from megadistill.report.evaluation_plots import calibration_figure, deciles_figure
from megadistill.report.run_record import printable, read_json
from megadistill.report.tables import NOTHING, Table, digits, text

MOST_MODELS = 32

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

MOST_PARTS = 1000
"""Bins, tenths or sources of a model: a file from elsewhere can claim any number of them."""

_FILE = TypeAdapter(list[Evaluation], config=ConfigDict(allow_inf_nan=False))


@dataclass(frozen=True)
class Results:
    """One file of evaluations."""

    name: str
    models: Sequence[Evaluation]

    def table(self) -> Table:
        """A row a model."""
        return _table("model", [(each.model, each) for each in self.models])

    def by_source(self) -> Table | None:
        """A row a model and source; None where there was one source alone."""
        parts = [(f"{each.model}: {part.source}", part) for each in self.models for part in each.by_source]
        return _table("model: source", parts) if len(parts) > len(self.models) else None


def read_results(path: Path, *, name: str) -> Results:
    """Raises UserError: the file is none that `megadistill evaluate --json` writes."""
    shown = printable(str(path))
    try:
        models = _FILE.validate_python(read_json(path))
    except FileNotFoundError:
        raise UserError(f"no evaluation {shown}: `megadistill evaluate --json FILE` writes one") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{shown}: no evaluations of this version ({printable(where)}: {first['msg'].lower()})"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: cannot be read as JSON: {printable(str(error))}") from None
    if not 0 < len(models) <= MOST_MODELS:
        raise UserError(f"{shown}: evaluations of {len(models)} models; a page shows 1 to {MOST_MODELS}")
    for each in models:
        if (
            each.tokens < 1
            or not each.calibration
            or max(map(len, (each.calibration, each.by_decile or (), each.by_source))) > MOST_PARTS
        ):
            raise UserError(
                f"{shown}: {text(each.model)} has no tokens, or more than {MOST_PARTS} parts: not an evaluation"
            )
    return Results(name=printable(name), models=models)


def results_figures(results: Results, prefix: str) -> list[Drawing]:
    """Calibration, and what the tenths of the tokens by teacher entropy say, where there was a teacher."""
    calibration = "Confidence: the probability of the most likely token. Accuracy: how often it was the label."
    drawn = [draw(calibration_figure(results.models), f"{prefix}-calibration", "Calibration", calibration)]
    if results.models[0].by_decile is not None:
        title = "Where the teacher is sure, and where not"
        drawn.append(draw(deciles_figure(results.models), f"{prefix}-deciles", title, "1: the surest tenth."))
    return drawn


def _table(heading: str, rows: Sequence[tuple[str, Evaluation | SourceResult]]) -> Table:
    """A row a name, with the columns that any of them has."""
    known = [key for key in COLUMNS if any(getattr(values, key, None) is not None for _, values in rows)]
    return Table(
        [heading, *(COLUMNS[key][0] for key in known)],
        [[text(name), *(_cell(getattr(values, key), COLUMNS[key][1]) for key in known)] for name, values in rows],
    )


def _cell(value: float | None, form: str) -> str:
    return NOTHING if value is None else digits(value, form)
