"""Numbers of the command line: each option's least and largest, far above what any use needs."""

import argparse
import math
from collections.abc import Callable

from megadistill.config.bounds import (
    MAX_MEGABYTES,
    MAX_RANKS,
    MAX_SEED,
    MAX_SEQUENCES,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TOKENS,
)

_LENGTH = (1, 10**8)
"""Tokens of a sequence, a prompt or a continuation: the longest contexts have 10^7."""
_SIZE = (1, 10**7)
"""Parts of a model, and ids of a vocabulary."""
_SEED = (-MAX_SEED, MAX_SEED)
_STEPS = (1, MAX_STEPS)
_FRACTION = (0, 1)

BOUNDS: dict[str, tuple[float, float]] = {
    "--batch": (1, MAX_SEQUENCES),
    "--count": (1, 10**6),
    "--ema": _FRACTION,
    "--fault-hours": (0.01, 10**6),
    "--fewshot": (0, 1000),
    "--gpus-per-node": (1, 1000),
    "--heads": _SIZE,
    "--heldout-fraction": _FRACTION,
    "--hidden-size": _SIZE,
    "--intermediate-size": _SIZE,
    "--job": (0, MAX_RANKS),
    "--jobs": (1, MAX_RANKS),
    "--last": (2, MAX_STEPS),
    "--layers": _SIZE,
    "--limit": (1, MAX_TOKENS),
    "--max-shard-mb": (1, MAX_MEGABYTES),
    "--new-tokens": _LENGTH,
    "--nodes": (1, MAX_RANKS),
    "--order-seed": _SEED,
    "--price": (0, 10**6),
    "--processes": (1, 1000),
    "--prompt-tokens": _LENGTH,
    "--seed": _SEED,
    "--sequence-length": _LENGTH,
    "--sequences": (1, MAX_TOKENS),
    "--shard-mb": (0, MAX_MEGABYTES),
    "--step": _STEPS,
    "--steps": _STEPS,
    "--stop-after": _STEPS,
    "--student-mfu": _FRACTION,
    "--teacher-loss": (0, 1000),
    "--teacher-mfu": _FRACTION,
    "--teacher-tokens": (0, MAX_TOKENS),
    "--temperature": (0, MAX_TEMPERATURE),
    "--top-p": _FRACTION,
    "--vocab-size": _SIZE,
}
"""Option -> least and largest value. The work itself may refuse more, with a reason."""

MAX_LETTERS = 30
"""Letters of a number in a message, and of a number: those of the largest bound, a sign and an exponent."""


def number_type(kind: type[int] | type[float], option: str) -> Callable[[str], float]:
    """The argparse type of a numeric option. Raises KeyError: the option has no bounds yet."""
    least, largest = BOUNDS[option]

    def number(text: str) -> float:
        try:
            value = kind(text) if len(text) <= MAX_LETTERS else kind("none")
        except ValueError:
            beginning = text if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS]}…"
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{beginning}: give {what}, {_range(least, largest)}") from None
        if kind is int and value < least:
            raise argparse.ArgumentTypeError(f"{text}: give at least {least:,}")
        if not least <= value <= largest or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: give a number {_range(least, largest)}")
        return value

    return number


def _range(least: float, largest: float) -> str:
    return f"from {least:,} up to {largest:,}"
