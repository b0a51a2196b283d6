"""Log lines: their format, which ranks write which levels, and their destinations."""

import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from megadistill import logs

logger = logging.getLogger("megadistill.train.loop")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    handlers, level = logs.PACKAGE.handlers[:], logs.PACKAGE.level
    yield
    logs.PACKAGE.handlers[:] = handlers
    logs.PACKAGE.setLevel(level)


def test_a_line_has_time_level_rank_and_logger(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(0)
    logger.info("step %d", 3)
    line = capsys.readouterr().out
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO rank 0 megadistill\.train\.loop: step 3\n", line)


def test_other_ranks_write_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(5)
    logger.info("step 3")
    logger.warning("the disk is full")
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.endswith("WARNING rank 5 megadistill.train.loop: the disk is full")


def test_configuring_twice_writes_a_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(0)
    logs.configure(0)
    logger.warning("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_file_has_the_same_lines_and_is_appended_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        logs.configure(0)
        logs.add_file(tmp_path / "log.txt", 0)
        logger.info("line %d", number)
    logs.configure(0)
    logger.info("no longer")
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() == printed[:2]


def test_no_secret_gets_into_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(0)
    logs.add_file(tmp_path / "log.txt", 0)
    logger.warning("cannot read %s", "https://me:hunter22@host/data")
    assert "hunter22" not in capsys.readouterr().err + (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("stream", "level"), [("stdout", logging.INFO), ("stderr", logging.WARNING)])
def test_lines_stay_above_a_progress_bar(stream: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, stream, terminal)
    logs.configure(0)
    with Progress(console=Console(file=terminal, force_terminal=True, width=200), auto_refresh=False) as progress:
        progress.add_task("training", total=2)
        progress.refresh()
        logger.log(level, "step 1")
    line, bar = (terminal.getvalue().rindex(part) for part in ("step 1", "training"))
    assert line < bar, "the bar is drawn again below the line"


class _Closed(io.StringIO):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), SystemExit(1)])
def test_a_terminal_that_is_gone_costs_the_line_alone(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logs.configure(0)
    monkeypatch.setattr(sys, "stdout", _Closed(error))
    logs.add_file(tmp_path / "log.txt", 0)
    logger.info("step 1")
    assert "step 1" in (tmp_path / "log.txt").read_text(encoding="utf-8")
