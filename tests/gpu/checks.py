"""The checks, most valuable first: the question of each, its time limit, and the bars that its figures must meet."""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Bar:
    """A limit of a figure. Figures without a bar are measurements alone."""

    figure: str
    """Name of the figure, or a pattern of names (`fnmatch`)."""
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    case: str = "*"
    """Cases that it is a bar of: a name, or a pattern."""

    def covers(self, case: str, figure: str) -> bool:
        return fnmatchcase(case, self.case) and fnmatchcase(figure, self.figure)

    def is_met(self, value: float) -> bool:
        """Never by NaN."""
        above = self.at_least is None or value >= self.at_least
        below = self.at_most is None or value <= self.at_most
        return value == value and above and below

    def __str__(self) -> str:
        parts = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        parts += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(parts) + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True)
class Check:
    """A module of this folder, started as a process of its own."""

    name: str
    question: str
    seconds: float
    """Time limit: at its end the process is killed, and what it had measured is kept."""
    bars: tuple[Bar, ...] = ()

    def bar(self, case: str, figure: str) -> Bar | None:
        """The first one that covers the figure."""
        return next((bar for bar in self.bars if bar.covers(case, figure)), None)


CHECKS = (
    Check(
        "ceilings",
        "What do the device's own matrix products and copies reach? Rates below are to be read beside these.",
        seconds=30,
    ),
)


def named(name: str) -> Check:
    """
    Raises:
        KeyError: there is no such check.
    """
    return {check.name: check for check in CHECKS}[name]
