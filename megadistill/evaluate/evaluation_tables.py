"""What an evaluation found, as tables that fit a terminal of 80 columns. It knows records, and computes nothing."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from megadistill.evaluate.evaluation import Decile, Evaluation, SourceResult

USUAL = ("CE", "perplexity", "bits/byte", "KL", "agree")


def tables(results: Sequence[Evaluation]) -> list[Table]:
    """What to print, the most general first; what needs a teacher, or several sources, where there are such."""
    shown = [_models(results), _closer_look(results)]
    if len(results[0].by_source) > 1:
        shown += [_source(results, number) for number in range(len(results[0].by_source))]
    if results[0].by_decile is not None:
        shown.append(_deciles(results))
    return shown


def _models(results: Sequence[Evaluation]) -> Table:
    sources = len(results[0].by_source)
    shown = _table(
        f"held-out, {results[0].tokens:,} tokens" + (f" of {sources} sources" if sources > 1 else ""),
        "CE: cross-entropy, nats a token. KL and agreement: with the teacher.",
    )
    _columns(shown, "parameters", *USUAL)
    for result in results:
        shown.add_row(escape(result.model), f"{result.parameters:,}", *_usual(result))
    return shown


def _closer_look(results: Sequence[Evaluation]) -> Table:
    shown = _table(
        "a closer look",
        "Calibration error: of the most likely token's probability, 21 bins. JSD and acceptance, the mean of "
        "Σ min(p, q): with the teacher.",
    )
    _columns(shown, "calibration error", "JSD", "acceptance")
    for result in results:
        shown.add_row(
            escape(result.model), f"{result.calibration_error:.2%}", _number(result.jsd), _share(result.acceptance)
        )
    return shown


def _source(results: Sequence[Evaluation], number: int) -> Table:
    found = [result.by_source[number] for result in results]
    shown = _table(f"{escape(found[0].source)}, {found[0].tokens:,} tokens")
    _columns(shown, *USUAL)
    for result, of_source in zip(results, found, strict=True):
        shown.add_row(escape(result.model), *_usual(of_source))
    return shown


def _deciles(results: Sequence[Evaluation]) -> Table:
    """A column a decile, and a row a model for each quantity; the teacher, which comes first, is its own measure."""
    teacher, *students = results
    of_teacher = teacher.by_decile or ()
    shown = Table(
        title="by decile of the teacher's entropy, from the lowest",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("decile", overflow="fold", min_width=13)
    for number, _ in enumerate(of_teacher, start=1):
        shown.add_column(str(number), justify="right", no_wrap=True)
    shown.add_row("entropy up to", *(_short(one.bounds and one.bounds[1]) for one in of_teacher))
    for heading, among, cell in (
        ("CE", results, lambda one: _short(one.cross_entropy)),
        ("KL", students, lambda one: _short(one.kl)),
        ("agreement", students, _agreement),
    ):
        if among:
            shown.add_row(heading, style="bold")
        for result in among:
            shown.add_row(f" {escape(result.model)}", *(cell(one) for one in result.by_decile or ()))
    return shown


def _table(title: str, caption: str | None = None) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", min_width=72)


def _columns(shown: Table, *numbers: str) -> None:
    shown.add_column("model", overflow="fold")
    for heading in numbers:
        shown.add_column(heading, justify="right", no_wrap=True)


def _usual(result: Evaluation | SourceResult) -> list[str]:
    """The cells under `USUAL`."""
    return [
        _number(result.cross_entropy),
        f"{result.perplexity:.2f}",
        _number(result.bits_per_byte),
        _number(result.kl),
        _share(result.agreement),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(value: float | None) -> str:
    """In five characters."""
    return "-" if value is None else f"{value:.3f}" if value < 9.9995 else f"{value:.2f}"


def _agreement(decile: Decile) -> str:
    return "-" if decile.agreement is None else f"{decile.agreement:.0%}"
