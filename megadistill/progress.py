"""Progress of a long command on standard error: bars on a terminal, lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

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
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=console) as bars:
        tasks = {}
        began = {}

        def show(stage: str, *, done: int, total: int, tokens: int | None = None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
                began[stage] = time.perf_counter()
            rate = _rate(done if tokens is None else tokens, time.perf_counter() - began[stage])
            bars.update(tasks[stage], completed=done, total=total, rate=rate)

        yield show


def _plain_lines(write: Callable[[str], None]) -> ShowProgress:
    began: dict[str, float] = {}
    written: dict[str, float] = {}

    def show(stage: str, *, done: int, total: int, tokens: int | None = None) -> None:
        now = time.perf_counter()
        seconds = now - began.setdefault(stage, now)
        if done < total and now - written.get(stage, -math.inf) < LINE_SECONDS:
            return
        written[stage] = now
        if tokens is None:
            parts = [f"{done:,} of {total:,} tokens", f"{done / seconds:,.0f} tokens/s" if done and seconds else ""]
        else:
            parts = [f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", _rate(tokens, seconds)]
        parts.append(_left(done, total, seconds))
        write(f"{stage}: {', '.join(part for part in parts if part)}")

    return show


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""


def _left(done: int, total: int, seconds: float) -> str:
    """Time that the rest takes at the pace so far."""
    if not 0 < done < total or seconds <= 0:
        return ""
    return f"{timedelta(seconds=round((total - done) / done * seconds))} left"
