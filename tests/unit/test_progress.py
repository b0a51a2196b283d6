"""Progress lines of a long command where there is no terminal."""

import io
import re

import pytest
from rich.console import Console

from megadistill import progress
from megadistill.progress import console_progress


def test_lines_come_at_the_start_at_intervals_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The clock is set by hand: a second a step, 0.1 MB each, a line every ten seconds."""
    now = 0.0
    monkeypatch.setattr(progress, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now)}))
    with console_progress() as show:
        for step in range(26):
            now = float(step)
            show("train [/x]", done=step * 100_000, total=2_500_000, tokens=step * 20_000)
    assert capfd.readouterr().err.splitlines() == [
        "train [/x]: 0 B of 2.5 MB",
        "train [/x]: 1 MB of 2.5 MB, 200,000 tokens, 20,000 tokens/s, 15 s left",
        "train [/x]: 2 MB of 2.5 MB, 400,000 tokens, 20,000 tokens/s, 5 s left",
        "train [/x]: 2.5 MB of 2.5 MB, 500,000 tokens, 20,000 tokens/s",
    ]


def test_work_that_has_no_bytes_is_counted_in_tokens(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now)}))
    with console_progress() as show:
        for now in (0.0, 10.0, 20.0):
            show("evaluate", done=int(now) * 1000, total=20_000)
    assert capfd.readouterr().err.splitlines() == [
        "evaluate: 0 of 20,000 tokens",
        "evaluate: 10,000 of 20,000 tokens, 1,000 tokens/s, 10 s left",
        "evaluate: 20,000 of 20,000 tokens, 1,000 tokens/s",
    ]


def test_work_of_an_earlier_start_does_not_shorten_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now)}))
    with console_progress() as show:
        for now, done in ((0.0, 8_000_000_000), (100.0, 9_000_000_000)):
            show("tokenize", done=done, total=89_000_000_000, tokens=int(now) * 10)
    assert capfd.readouterr().err.splitlines()[1] == (
        "tokenize: 9 GB of 89 GB, 1,000 tokens, 10 tokens/s, 2 h 13 min left"
    )


def test_a_terminal_of_80_columns_has_a_bar_and_all_of_that_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=80, color_system=None)
    )
    now = 0.0
    monkeypatch.setattr(progress, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now)}))
    with console_progress() as show:
        show("tokenize heldout", done=0, total=89_000_000, tokens=0)
        now = 100.0
        show("tokenize heldout", done=9_000_000, total=89_000_000, tokens=9_000_000)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("tokenize heldout ")
    assert last.rstrip().endswith("10% 90,000 tokens/s, 15 min left")
    assert len(last) <= 80
