"""Amounts in words: three digits with a decimal prefix, seconds to days."""


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


def spell(seconds: float) -> str:
    """A duration in a fitting unit: `750 ms`, `12.3 s`, `19.0 min`, `5.1 h`, `7.0 days`."""
    if seconds == 0:
        return "0"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:,.1f} days"
