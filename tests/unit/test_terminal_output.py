"""Names and values from outside reach a terminal as plain text of a bounded length, wherever it is printed.

A hostile text is a line of tests/hostile_texts.yaml.
"""

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megadistill import logs
from megadistill.cli.common import say
from megadistill.cli.main import run_command
from megadistill.errors import UserError, several
from megadistill.progress import _plain_lines
from megadistill.redaction import printable_line, printable_lines
from megadistill.terminal_tables import print_tables
from tests.paths import RECIPES, ROOT

LINES = (ROOT / "tests/hostile_texts.yaml").read_text(encoding="utf-8").splitlines()
HALF = "\\ud800"  # YAML has no halves of pairs
HOSTILE = ["\ud800 half" if HALF in line else yaml.safe_load(line)[0] for line in LINES if line.startswith("- ")]
LONG = "x" * 10_000_000


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    handlers, level, factory = logs.PACKAGE.handlers[:], logs.PACKAGE.level, logging.getLogRecordFactory()
    yield
    logs.PACKAGE.handlers[:] = handlers
    logs.PACKAGE.setLevel(level)
    logging.setLogRecordFactory(factory)


def assert_harmless(printed: str, *, lines: int | None = None) -> None:
    odd = {letter for letter in printed if not letter.isprintable() and letter != "\n"}
    assert not odd, repr(printed)
    printed.encode()
    if lines is not None:
        assert printed.count("\n") == lines, repr(printed)


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_is_one_line(text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: object) -> None:
        raise UserError(f"x: {text}: name another")

    monkeypatch.setattr("megadistill.cli.plan._config_keys", refuse)
    assert run_command(["config-keys"]) == 2
    assert_harmless(capsys.readouterr().err, lines=1)


def test_mistakes_keep_their_lines_and_a_value_has_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(options: object) -> None:
        raise several("r.yaml", [("r.yaml, line 1", "a\nb"), ("", "\x1b[2J")])

    monkeypatch.setattr("megadistill.cli.plan._config_keys", refuse)
    assert run_command(["config-keys"]) == 2
    assert_harmless(capsys.readouterr().err, lines=3)


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\0" not in text and "\ud800" not in text])
@pytest.mark.parametrize("key", ["run.folder", "data.manifest", "train.precision", "teacher.path", "nothing"])
def test_a_value_of_a_recipe_is_one_line(text: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", str(RECIPES / "smoke.yaml"), "--set", f"{key}={text}", "--set", "a=1"]) == 2
    error = capsys.readouterr().err
    assert_harmless(error)
    assert all(line.startswith(("megadistill: ", "  ")) for line in error.splitlines()), error


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", ["cell", "heading", "title", "text", "styled"])
def test_a_table_shows_a_name_as_it_is(text: str, kind: str) -> None:
    """Brackets are no markup: they would be lost, or end the command after the work is done."""
    table = Table(title=text if kind == "title" else "title", title_justify="left")
    table.add_column(text if kind == "heading" else "heading")
    table.add_row(text if kind == "cell" else Text(text, style="bold") if kind == "styled" else "cell")
    file = io.StringIO()
    print_tables(Console(file=file, width=100), Text(text) if kind == "text" else table)
    printed = file.getvalue()
    assert_harmless(printed)
    if "[" in text and text.isprintable():
        assert text in printed


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", ["megadistill.train.loop", "fsspec"])
def test_a_log_line_shows_a_name_as_it_is(text: str, name: str, tmp_path: Path) -> None:
    logs.configure(0)
    logs.add_file(tmp_path / "log.txt", 0)
    logger = logging.getLogger(name)
    caught: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        logger.warning("%s has %d steps, %.2f s, %r", text, 3, 0.5, text)
        logger.warning("%s", ValueError(text))
    finally:
        logger.removeHandler(handler)
    assert " has 3 steps, 0.50 s, " in caught[0]
    for message in caught:
        assert_harmless(message, lines=0 if name.startswith("megadistill") else None)
    if name.startswith("megadistill"):
        assert_harmless((tmp_path / "log.txt").read_text(encoding="utf-8"), lines=2)


PRINTERS: dict[str, Callable[[str], Any]] = {
    "say": say,
    "progress": lambda text: _plain_lines(say)(text, done=1, total=1),
}


@pytest.mark.parametrize("printer", PRINTERS)
@pytest.mark.parametrize("text", HOSTILE)
def test_other_lines_are_harmless(text: str, printer: str, capsys: pytest.CaptureFixture[str]) -> None:
    PRINTERS[printer](f"{text}: done")
    assert_harmless(capsys.readouterr().out)


def test_a_traceback_is_harmless(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> None:
        raise RuntimeError("\x1b[2J https://me:password@host/x " + LONG)

    monkeypatch.setattr("megadistill.cli.plan._config_keys", fail)
    assert run_command(["config-keys"]) == 4
    error = capsys.readouterr().err
    assert_harmless(error)
    assert "RuntimeError" in error
    assert "password" not in error
    assert len(error) < 20_000


def test_long_values_are_cut_and_keep_their_end() -> None:
    line = printable_line(f"--set x={LONG}: name another")
    assert len(line) < 5000
    assert line.startswith("--set x=x")
    assert line.endswith(": name another")
    assert printable_lines("a\tb\nc") == "a\N{REPLACEMENT CHARACTER}b\nc"
    file = io.StringIO()
    print_tables(Console(file=file, width=80), Text(LONG))
    assert len(file.getvalue()) < 5000
