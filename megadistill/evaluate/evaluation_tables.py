"""Tables of an evaluation for a terminal of 80 columns."""

from collections.abc import Sequence

from rich.table import Table

from megadistill.evaluate.evaluation import MEASURES, Evaluation, measure_cells
from megadistill.heldout.measures import Measures

MAIN = ("cross_entropy", "perplexity", "bits_per_byte", "kl", "agreement")
FURTHER = ("calibration_error", "jsd", "acceptance")


def tables(results: Sequence[Evaluation]) -> list[Table]:
    """Over all tokens, by source where there are several, and by decile where there is a teacher."""
    sources = len(results[0].by_source)
    title = f"held-out, {results[0].tokens:,} tokens" + (f" of {sources} sources" if sources > 1 else "")
    caption = (
        "CE: cross-entropy, nats a token. KL and agreement: with the teacher. Documents that bestfit has packed "
        "together are read each by itself."
    )
    parts = [_measures(title, results, ("parameters", *MAIN), results, caption)]
    caption = (
        "Calibration error: of the most likely token's probability, 21 bins. JSD and acceptance, the mean of "
        "Σ min(p, q): with the teacher."
    )
    parts.append(_measures("calibration and distance", results, FURTHER, results, caption))
    for of_source in zip(*(result.by_source for result in results), strict=True) if sources > 1 else ():
        title = f"{of_source[0].source}, {of_source[0].tokens:,} tokens"
        parts.append(_measures(title, results, MAIN, of_source))
    if results[0].by_decile is not None:
        parts.append(_deciles(results))
    return parts


def _measures(
    title: str,
    models: Sequence[Evaluation],
    names: Sequence[str],
    results: Sequence[Measures],
    caption: str | None = None,
) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("model")
    for name in names:
        table.add_column(MEASURES[name][0], justify="right", no_wrap=True)
    for model, result in zip(models, results, strict=True):
        table.add_row(model.model, *measure_cells(result, names))
    return table


def _deciles(results: Sequence[Evaluation]) -> Table:
    """A column a decile, and a row a model for each quantity; the teacher comes first and has no KL."""
    title = "by decile of the teacher's entropy, from the lowest"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("decile")
    bounds = [decile.bounds for decile in results[0].by_decile or ()]
    for number, _ in enumerate(bounds, start=1):
        table.add_column(str(number), justify="right", no_wrap=True)
    table.add_row("entropy up to", *(_cell(bound and bound[1]) for bound in bounds))
    for name, models in (("cross_entropy", results), ("kl", results[1:]), ("agreement", results[1:])):
        if models:
            table.add_row(MEASURES[name][0], style="bold")
        for model in models:
            values = (getattr(decile, name) for decile in model.by_decile or ())
            table.add_row(f" {model.model}", *(_cell(value, percent=name == "agreement") for value in values))
    return table


def _cell(value: float | None, *, percent: bool = False) -> str:
    """A number as text of five characters or fewer."""
    form = ".0%" if percent else ".3f" if value is not None and value < 9.9995 else ".2f"
    return "-" if value is None else format(value, form)
