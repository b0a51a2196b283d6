"""Progress lines of a long command where there is no terminal."""

import pytest

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
        "train [/x]: 0.0 of 2.5 MB",
        "train [/x]: 1.0 of 2.5 MB, 200,000 tokens, 20,000 tokens/s, 0:00:15 left",
        "train [/x]: 2.0 of 2.5 MB, 400,000 tokens, 20,000 tokens/s, 0:00:05 left",
        "train [/x]: 2.5 of 2.5 MB, 500,000 tokens, 20,000 tokens/s",
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
        "evaluate: 10,000 of 20,000 tokens, 1,000 tokens/s, 0:00:10 left",
        "evaluate: 20,000 of 20,000 tokens, 1,000 tokens/s",
    ]
