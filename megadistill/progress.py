"""Progress of a long command on standard error: bars on a terminal, lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from megadistill.redaction import printable_line
from megadistill.units import left, readable

LINE_SECONDS = 10.0
"""Time between plain lines where there is no terminal."""


class ShowProgress(Protocol):
    """Callback for work that is done: the stage's name, bytes done and in all, tokens made or read so far.

    `tokens` None: `done` and `total` count tokens.
    """

    def __call__(self, stage: str, *, done: int, total: int, tokens: int | None = None) -> None: ...


@contextmanager
def console_progress() -> Iterator[ShowProgress]:
    """A bar a stage on a terminal; elsewhere a line when a stage begins, every LINE_SECONDS, and when it ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
        return
    name = TextColumn("{task.description}", markup=False)
    with Progress(name, short_bar(), TaskProgressColumn(), TextColumn("{task.fields[pace]}"), console=console) as bars:
        tasks, paces = {}, _Paces()

        def show(stage: str, *, done: int, total: int, tokens: int | None = None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable_line(stage), total=total, pace="")
            pace = ", ".join(paces.update(stage, done, total, tokens))
            bars.update(tasks[stage], completed=done, total=total, pace=pace)

        yield show


def short_bar() -> BarColumn:
    """A bar that leaves space for numbers on a line of 80 columns."""
    return BarColumn(bar_width=16)


def _plain_lines(write: Callable[[str], None]) -> ShowProgress:
    written: dict[str, float] = {}
    paces = _Paces()

    def show(stage: str, *, done: int, total: int, tokens: int | None = None) -> None:
        now = time.perf_counter()
        pace = paces.update(stage, done, total, tokens)
        if done < total and now - written.get(stage, -math.inf) < LINE_SECONDS:
            return
        written[stage] = now
        amount = (
            f"{done:,} of {total:,} tokens" if tokens is None else f"{readable(done, 'B')} of {readable(total, 'B')}"
        )
        so_far = [f"{tokens:,} tokens"] if tokens else []
        write(f"{printable_line(stage)}: {', '.join([amount, *so_far, *pace])}")

    return show


class _Paces:
    """The pace of each stage since it began."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}

    def update(self, stage: str, done: int, total: int, tokens: int | None) -> list[str]:
        """Tokens/s and the time that is left, as far as they are known.

        What was done when the stage began took another start's time, and does not count for the time that is left.
        """
        now = time.perf_counter()
        begin, before = self._began.setdefault(stage, (now, done))
        seconds, parts = now - begin, []
        if seconds > 0:
            made = done - before if tokens is None else tokens
            parts += [f"{made / seconds:,.0f} tokens/s"] if made else []
            parts += [left((total - done) / (done - before) * seconds)] if before < done < total else []
        return parts
