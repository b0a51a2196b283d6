"""Progress: how far a long verb is, as bars on a terminal and as lines elsewhere. It knows no verb."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Between plain lines where there is no terminal."""


class ShowProgress(Protocol):
    """Told of work as it is done: `stage` in words, bytes done and in all, tokens made or read so far."""

    def __call__(self, stage: str, *, done: int, total: int, tokens: int) -> None: ...


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

        def show(stage: str, *, done: int, total: int, tokens: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
                began[stage] = time.perf_counter()
            rate = _rate(tokens, time.perf_counter() - began[stage])
            bars.update(tasks[stage], completed=done, total=total, rate=rate)

        yield show


def _plain_lines(say: Callable[[str], None]) -> ShowProgress:
    began: dict[str, float] = {}
    said: dict[str, float] = {}

    def show(stage: str, *, done: int, total: int, tokens: int) -> None:
        now = time.perf_counter()
        seconds = now - began.setdefault(stage, now)
        if done < total and now - said.get(stage, -math.inf) < LINE_SECONDS:
            return
        said[stage] = now
        parts = (f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", _rate(tokens, seconds), _left(done, total, seconds))
        say(f"{stage}: {', '.join(part for part in parts if part)}")

    return show


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""


def _left(done: int, total: int, seconds: float) -> str:
    """How long the rest takes at the pace so far."""
    if not 0 < done < total or seconds <= 0:
        return ""
    return f"{timedelta(seconds=round((total - done) / done * seconds))} left"
