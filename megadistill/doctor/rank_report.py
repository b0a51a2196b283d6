"""Reports of the ranks' checks, and their summary over the launch.

A rank reports a result for each check. The summary has a row for each check: one text where the ranks agree, a text by
node where they do not. A node is bad where a check of the node itself fails, or where a check fails there alone.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from megadistill.errors import UserError
from megadistill.units import short

Value = TypeVar("Value")
NAMED = 4
"""Nodes or ranks that a line names; the others are counted."""


class Status(Enum):
    """Result of a check; the value is its sign in a table."""

    OK = "✓"
    WARN = "!"
    FAIL = "✗"


_SEVERITY = {Status.OK: 0, Status.WARN: 1, Status.FAIL: 2}


@dataclass(frozen=True)
class CheckResult:
    """One rank's result of a check. `of_node`: whether the check is of the rank's node, not of the recipe."""

    check: str
    status: Status
    detail: str
    of_node: bool = False


@dataclass
class RankReport:
    """One rank's results, and facts that are compared with those of the other ranks."""

    rank: int
    host: str
    results: list[CheckResult] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, check: str, status: Status, detail: str, *, of_node: bool = False) -> None:
        self.results.append(CheckResult(check, status, detail, of_node))

    def check(self, name: str, run: Callable[[], tuple[Value, str]], *, of_node: bool = False) -> Value | None:
        """Adds the result of `run`, which returns a value and a detail. A refusal is a failure; its value is None.

        A refusal that an earlier check has given is not repeated.
        """
        try:
            value, detail = run()
        except (UserError, OSError) as error:
            if all(result.detail != str(error) for result in self.results):
                self.add(name, Status.FAIL, str(error), of_node=of_node)
            return None
        self.add(name, Status.OK, detail, of_node=of_node)
        return value


@dataclass(frozen=True)
class Row:
    """Result of a check over all ranks, and the nodes that cause a failure."""

    check: str
    status: Status
    detail: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All rows of an examination."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.status is not Status.FAIL for row in self.rows)

    @property
    def bad_nodes(self) -> list[str]:
        return sorted({node for row in self.rows for node in row.nodes})

    def table(self) -> Table:
        """The rows as a table of three columns."""
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for row in self.rows:
            table.add_row(row.status.value, row.check, Text(row.detail))  # a detail may look like markup
        return table

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "status": row.status.name.lower(), "nodes": list(row.nodes)} for row in self.rows]
        return {"ok": self.ok, "bad_nodes": self.bad_nodes, "rows": rows}


def summarize(reports: Sequence[RankReport]) -> list[Row]:
    """A row for each check that any rank has made, in the order of its first result."""
    checks = dict.fromkeys(result.check for report in reports for result in report.results)
    return [_row(check, reports) for check in checks]


def _row(check: str, reports: Sequence[RankReport]) -> Row:
    hosts_of: dict[tuple[Status, str], list[str]] = {}
    of_node = False
    for report in reports:
        for result in report.results:
            if result.check == check:
                hosts_of.setdefault((result.status, result.detail), []).append(report.host)
                of_node = of_node or (result.of_node and result.status is Status.FAIL)
    worst = max((status for status, _ in hosts_of), key=_SEVERITY.__getitem__)
    details = {detail: hosts for (status, detail), hosts in hosts_of.items() if status is worst}
    others = {host for (status, _), hosts in hosts_of.items() if status is not worst for host in hosts}
    affected = {host for hosts in details.values() for host in hosts}
    if worst is Status.OK or (not others and len(details) == 1):
        text = "; ".join(list(details)[:NAMED])
    else:
        text = "; ".join(f"{some(sorted(set(hosts)))}: {detail}" for detail, hosts in list(details.items())[:NAMED])
    at_fault = worst is Status.FAIL and (of_node or (others and not others & affected))
    return Row(check, worst, text, tuple(sorted(affected)) if at_fault else ())


def require_same(check: str, values: Sequence[str], reports: Sequence[RankReport], *, same: str) -> Row:
    """Compares the `values` of `reports`; fails for those unlike the most frequent one, the first of equally frequent.

    `same`: the detail where all are equal.
    """
    counts, hosts = Counter(values), [report.host for report in reports]
    if len(counts) == 1:
        return Row(check, Status.OK, same)
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    odd = {value: sorted({host for v, host in zip(values, hosts, strict=True) if v == value}) for value in counts}
    others = "; ".join(f"{some(odd[value])}: {value}" for value in list(counts) if value != usual)
    nodes = sorted({host for value, named in odd.items() if value != usual for host in named} - set(odd[usual]))
    return Row(check, Status.FAIL, f"{others}; elsewhere {usual}", tuple(nodes))


def some(names: Iterable[str]) -> str:
    """The first few names, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def spread(values: Sequence[float], unit: str) -> str:
    """Range and median, `12.3 to 45.6 GB/s, median 40`; a single value alone."""
    low, high = min(values), max(values)
    if len(values) == 1:
        return f"{short(low)} {unit}"
    return f"{short(low)} to {short(high)} {unit}, median {short(statistics.median(values))}"
