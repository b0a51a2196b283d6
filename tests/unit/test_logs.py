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


def test_a_file_that_is_added_again_has_a_line_once(tmp_path: Path) -> None:
    """As where replicas come and go, and the same one writes on."""
    logs.configure(0, replica="1")
    for _ in range(2):
        logs.add_file(tmp_path / "log.txt", 0)
    logger.info("once")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").count("once") == 1


def test_lines_of_the_run_come_from_the_replica_that_logs_it_and_warnings_from_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(0, replica="1")
    logger.info("models loaded")
    logs.log_run(here=False)
    logger.info("step 1")
    logger.warning("the disk is full")
    logs.log_run(here=True)  # the replica that did it before is lost
    logger.info("step 2")
    printed = capsys.readouterr()
    assert [line.split(": ")[-1] for line in printed.out.splitlines()] == ["models loaded", "step 2"]
    assert "replica 1 rank 0" in printed.err


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


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STEP = (
    "step 150/400 | loss 0.5900 | ce 4.5169 | kl 0.5900 | agree 38.4% | lr 0.00333 | grad 0.638 | 154k tokens, "
    "epoch 0.12 | 1,212 tokens/s | 3 min 26 s left"
)
PATH = "/scratch/somebody/a-long-name-of-a-folder/runs/smoke/distill/checkpoints/step-00001000/rank-00000.safetensors"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_line_fits_a_terminal_and_breaks_between_fields_and_words(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out, err = _Terminal(), _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    logs.configure(0)
    logger.info(STEP)
    logger.warning("cannot read %s: the disk is full, and the step that needs it is taken again", PATH)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 150/400( \|.*)?", lines[0])
    assert max(map(len, lines)) < columns
    assert len(lines) == {60: 4, 80: 3, 200: 1}[columns]
    fields = [field.strip() for line in lines for field in line[9 * (line is lines[0]) :].split("|")]
    assert [field for field in fields if field] == STEP.split(" | "), "no field is cut"
    warning = err.getvalue()
    assert re.match(r"\d\d:\d\d:\d\d WARNING cannot read\s", warning)
    assert PATH in warning, "a path can be copied in one piece"
    assert all(line.startswith(logs.INDENT) for line in warning.splitlines()[1:])


@pytest.mark.parametrize(("stream", "level"), [("stdout", logging.INFO), ("stderr", logging.WARNING)])
def test_a_line_above_a_progress_bar_breaks_as_without_one(
    stream: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    logs.configure(0)
    alone, terminal = _Terminal(), _Terminal()
    monkeypatch.setattr(sys, stream, alone)
    logger.log(level, STEP)
    monkeypatch.setattr(sys, stream, terminal)
    with Progress(console=Console(file=terminal, force_terminal=True, width=80), auto_refresh=False) as progress:
        progress.add_task("training", total=2)
        progress.refresh()
        logger.log(level, STEP)
        progress.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    lines = [line.rstrip() for line in plain.splitlines()]
    message = [line.rstrip() for line in alone.getvalue().splitlines()]
    assert len(message) == 3
    begin = next(number for number, line in enumerate(lines) if "step 150" in line)
    assert [line[9 * (not number) :] for number, line in enumerate(lines[begin : begin + 3])] == [
        line[9 * (not number) :] for number, line in enumerate(message)
    ]


def test_the_lines_of_another_rank_replace_the_progress_bar_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.configure(3)
    logger.warning("the disk is full")
    assert re.fullmatch(r"\r\x1b\[2K\d\d:\d\d:\d\d WARNING rank 3: the disk is full\n", terminal.getvalue())


def test_a_file_has_complete_lines_though_the_terminal_has_short_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", _Terminal())
    logs.configure(0)
    logs.add_file(tmp_path / "log.txt", 0)
    logger.info(STEP)
    (line,) = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert line.endswith(f"INFO rank 0 megadistill.train.loop: {STEP}")


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
