"""How far an evaluation is, in tokens: a bar on a terminal, a line now and then elsewhere. It knows no models."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeAlias

from rich.console import Console
from rich.progress import Progress

from megadistill.data.prepare.progress import LINE_SECONDS

ShowTokens: TypeAlias = Callable[[int, int], None]
"""Told how many tokens are done, and of how many."""


@contextmanager
def token_progress() -> Iterator[ShowTokens]:
    """On standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(say: Callable[[str], None]) -> ShowTokens:
    began, said = time.perf_counter(), -math.inf

    def show(done: int, total: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if 0 < done < total and now - said >= LINE_SECONDS:
            rate = done / (now - began)
            left = timedelta(seconds=round((total - done) / rate))
            say(f"{done:,} of {total:,} tokens, {rate:,.0f} tokens/s, {left} left")
            said = now

    return show
