"""Output of `evaluate` on a terminal."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megadistill.cli import evaluate as command


def test_tables_are_printed_once_the_progress_bar_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    @contextmanager
    def bar() -> Iterator[None]:
        yield
        happened.append("bar ended")

    @contextmanager
    def ranks(launch: object) -> Iterator[Namespace]:
        yield Namespace(is_first=True)

    monkeypatch.setattr("megadistill.progress.console_progress", bar)
    monkeypatch.setattr("megadistill.evaluate.evaluate.ranks", ranks)
    monkeypatch.setattr("megadistill.evaluate.evaluate.evaluate", lambda *models, **options: [])
    monkeypatch.setattr("megadistill.heldout.splits.load_splits", lambda *given, **options: {})
    monkeypatch.setattr("megadistill.evaluate.evaluation_tables.tables", lambda results: [])
    monkeypatch.setattr(command, "print_tables", lambda *tables: happened.append("tables"))
    command._evaluate(
        Namespace(data=[], limit=None, insert_bos=False, models=[], teacher=None, batch=1, json=None, plots=None)
    )
    assert happened == ["bar ended", "tables"]
