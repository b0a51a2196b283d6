"""Numbers and lists as people write them: `8.03 GB`, `395k`, `2 h 13 min`, `3e-4`, `a, b and c`."""

from collections.abc import Sequence


def readable(amount: float, unit: str) -> str:
    """Three significant digits with a decimal prefix: `8.03 G`, `16.1 GB`."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while amount >= 999.5 and len(prefixes) > 1:
        amount /= 1000
        prefixes.pop(0)
    return f"{amount:.3g} {prefixes[0]}{unit}".rstrip()


def count(number: float) -> str:
    """Numbers of parameters and tokens in their usual form: `8.03B`, `2T`."""
    return readable(number, "").replace(" ", "").replace("G", "B")


def number_of(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things: `1 shard`, `12,345 shards`, `2 processes`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Sequence[str]) -> str:
    """One name or more in a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def short(number: float) -> str:
    """Three significant digits, without zeros that say nothing: `0.004`, `3e-5`, `130`, `12,345`, `1e+20`."""
    if 999.5 <= abs(number) < 1e15:
        return f"{number:,.0f}"
    digits, exponent, power = f"{number:.3g}".partition("e")
    if not exponent:
        return digits
    return f"{digits}e{'+' if int(power) > 0 else ''}{int(power)}"


def spell(seconds: float) -> str:
    """A duration in fitting units: `750 ms`, `12.3 s`, `2 min 5 s`, `19 min`, `5 h 6 min`, `7 days`."""
    if seconds == 0:
        return "0"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 119.95:
        return f"{_one_decimal(seconds)} s"
    if seconds < 599.5:
        return _two_units(round(seconds), "min", "s")
    if seconds < 172_770:
        return _two_units(round(seconds / 60), "h", "min")
    return f"{_one_decimal(seconds / 86400)} days"


def left(seconds: float) -> str:
    """The time that work still takes: `15 s left`, `2 h 13 min left`."""
    return f"{spell(max(1, round(seconds)))} left"


def _one_decimal(number: float) -> str:
    return f"{number:,.1f}".removesuffix(".0")


def _two_units(amount: int, large: str, small: str) -> str:
    """`amount` of a unit, as sixties of it and the rest: `2 min 5 s`, `5 h`, `19 min`."""
    parts = ((amount // 60, large), (amount % 60, small))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
