"""Room `doctor`: what each rank found before a run, and what all of it says of the launch. It measures nothing itself.

A *finding* is what one rank says of one thing. A *row* is what the ranks say of it together: once where they agree, by
node where they do not. A node is bad where its own means failed, or where what failed there did not fail elsewhere.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from megadistill.errors import UserError

Value = TypeVar("Value")
NAMED = 4
"""Nodes or ranks that a line names; the others are counted."""


class Mark(Enum):
    """How a thing was found; the value is its sign in a table."""

    GOOD = "✓"
    DOUBTFUL = "!"
    BAD = "✗"


_SEVERITY = {Mark.GOOD: 0, Mark.DOUBTFUL: 1, Mark.BAD: 2}


@dataclass(frozen=True)
class Finding:
    """What one rank says of the thing `what`. `of_node`: whether it is a matter of its node's, not of the recipe's."""

    what: str
    mark: Mark
    said: str
    of_node: bool = False


@dataclass
class Examined:
    """One rank: its findings, and facts that mean something only beside those of the others."""

    rank: int
    host: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, what: str, mark: Mark, said: str, *, of_node: bool = False) -> None:
        self.findings.append(Finding(what, mark, said, of_node))

    def look(self, what: str, at: Callable[[], tuple[Value, str]], *, of_node: bool = False) -> Value | None:
        """Asks `at` for a value and what to say of it; None, and a bad finding, where it is refused."""
        try:
            value, said = at()
        except (UserError, OSError) as error:
            self.note(what, Mark.BAD, str(error), of_node=of_node)
            return None
        self.note(what, Mark.GOOD, said, of_node=of_node)
        return value

    def dumps(self) -> str:
        findings = [{**asdict(each), "mark": each.mark.name} for each in self.findings]
        return json.dumps({"rank": self.rank, "host": self.host, "findings": findings, "facts": self.facts})

    @classmethod
    def loads(cls, text: str) -> "Examined":
        values = json.loads(text)
        findings = [Finding(**{**each, "mark": Mark[each["mark"]]}) for each in values["findings"]]
        return cls(values["rank"], values["host"], findings, values["facts"])


@dataclass(frozen=True)
class Row:
    """What is known of one thing on all ranks, and the nodes that are to blame."""

    what: str
    mark: Mark
    said: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All rows of an examination."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.mark is not Mark.BAD for row in self.rows)

    @property
    def bad_nodes(self) -> list[str]:
        return sorted({node for row in self.rows for node in row.nodes})

    def table(self) -> Table:
        """For a person."""
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in self.rows:
            table.add_row(row.mark.value, row.what, Text(row.said))  # what is said may look like markup
        return table

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [
            {"what": row.what, "mark": row.mark.name.lower(), "said": row.said, "nodes": list(row.nodes)}
            for row in self.rows
        ]
        return {"ok": self.ok, "bad_nodes": self.bad_nodes, "rows": rows}


def rows_of(examined: Sequence[Examined]) -> list[Row]:
    """A row for each thing of which any rank says something, in the order in which it is first spoken of."""
    things = dict.fromkeys(finding.what for each in examined for finding in each.findings)
    return [_row(what, examined) for what in things]


def _row(what: str, examined: Sequence[Examined]) -> Row:
    spoken: dict[tuple[Mark, str], list[str]] = {}
    of_node = False
    for each in examined:
        for finding in each.findings:
            if finding.what == what:
                spoken.setdefault((finding.mark, finding.said), []).append(each.host)
                of_node = of_node or (finding.of_node and finding.mark is Mark.BAD)
    worst = max((mark for mark, _ in spoken), key=_SEVERITY.__getitem__)
    worse = {said: hosts for (mark, said), hosts in spoken.items() if mark is worst}
    others = {host for (mark, _), hosts in spoken.items() if mark is not worst for host in hosts}
    told = {host for hosts in worse.values() for host in hosts}
    if worst is Mark.GOOD or (not others and len(worse) == 1):
        said = "; ".join(list(worse)[:NAMED])
    else:
        said = "; ".join(f"{some(sorted(set(hosts)))}: {text}" for text, hosts in list(worse.items())[:NAMED])
    blamed = worst is Mark.BAD and (of_node or (others and not others & told))
    return Row(what, worst, said, tuple(sorted(told)) if blamed else ())


def require_same(what: str, values: Sequence[str], hosts: Sequence[str], *, same: str) -> Row:
    """`values` of the ranks must be one. Those unlike most of them, or unlike the first where none is most, are told.

    `same`: what to say where they are one.
    """
    counts = Counter(values)
    if len(counts) == 1:
        return Row(what, Mark.GOOD, same)
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    odd = {value: sorted({host for v, host in zip(values, hosts, strict=True) if v == value}) for value in counts}
    others = "; ".join(f"{some(odd[value])}: {value}" for value in list(counts) if value != usual)
    nodes = sorted({host for value, named in odd.items() if value != usual for host in named} - set(odd[usual]))
    return Row(what, Mark.BAD, f"{others}; elsewhere {usual}", tuple(nodes))


def differing(facts: Mapping[str, str], usual: Mapping[str, str]) -> str:
    """`name value` of the facts that are not the usual ones."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if usual.get(name) != value)


def some(names: Iterable[str]) -> str:
    """The first few names, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def spread(values: Sequence[float], unit: str) -> str:
    """`12.3 to 45.6 GB/s, median 40`; one value alone is said alone."""
    low, high = min(values), max(values)
    if len(values) == 1:
        return f"{low:.3g} {unit}"
    return f"{low:.3g} to {high:.3g} {unit}, median {statistics.median(values):.3g}"
