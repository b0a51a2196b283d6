"""Evaluations as tables and figures of a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from megadistill.evaluate.evaluation import Evaluation, Measures, measure_rows
from megadistill.report.drawing import Drawing, draw
from megadistill.report.evaluation_plots import calibration_figure, deciles_figure
from megadistill.report.tables import NOTHING, Table, text


@dataclass(frozen=True)
class Results:
    """One file of evaluations."""

    name: str
    models: Sequence[Evaluation]

    def table(self) -> Table:
        """A row a model."""
        return _table("model", [(each.model, each) for each in self.models])

    def by_source(self) -> Table | None:
        """A row a model and source; None where there is one source alone."""
        parts = [(f"{each.model}: {part.source}", part) for each in self.models for part in each.by_source]
        return _table("model: source", parts) if len(parts) > len(self.models) else None

    def figures(self, prefix: str) -> list[Drawing]:
        """Calibration, and where there was a teacher the results by decile of its entropy."""
        caption = "Confidence: the probability of the most likely token. Accuracy: how often it was the label."
        drawn = [draw(calibration_figure(self.models), f"{prefix}-calibration", "Calibration", caption)]
        if self.models[0].by_decile is not None:
            title, caption = "By decile of the teacher's entropy", "1: the tenth of lowest entropy."
            drawn.append(draw(deciles_figure(self.models), f"{prefix}-deciles", title, caption))
        return drawn


def _table(heading: str, results: Sequence[tuple[str, Measures]]) -> Table:
    named = [(text(name), result) for name, result in results]
    head, *rows = measure_rows(heading, named, missing=NOTHING)
    return Table(head, rows)
