"""Room `doctor`: what the facts of all ranks say beside each other. It measures nothing and talks to nobody.

On a CPU, ranks share cores and memory with whatever else runs, so what is slow there is doubtful, not bad.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

from megadistill.distributed.bandwidth import Pair
from megadistill.doctor.findings import Examined, Mark, Row, require_same, some, spread
from megadistill.train.checkpoint.writer import FREE_SPACE_MARGIN
from megadistill.train.resilience.stragglers import SLOWER, slow

CLOCK_DOUBTFUL_SECONDS, CLOCK_BAD_SECONDS = 1.0, 60.0
"""From the one on, times of logs cannot be compared; at the other, object stores and JIT locks take offence."""
PAIR_SLOWER = 2.0
"""Times slower than the median pair of its kind that a pair may be."""
CHECKPOINTS = 2
"""The old one stays until the new one is whole."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: the float32 master copy and AdamW's two moments."""
TIGHT = 0.9
"""Of the free memory: what is counted is not all that a run takes."""


def versions_row(examined: Sequence[Examined]) -> Row:
    """Only what is not the same everywhere is told by node."""
    versions = [each.facts["versions"] for each in examined]
    unlike = [name for name in versions[0] if len({each.get(name) for each in versions}) > 1]
    told = [" ".join(f"{name} {each.get(name)}" for name in unlike) for each in versions]
    usual = ", ".join(f"{name} {version}" for name, version in versions[0].items())
    return require_same("versions", told, [each.host for each in examined], same=usual)


def contents_row(examined: Sequence[Examined]) -> Row | None:
    """Recipe, data and teacher, by what is in them; None where nobody could read them."""
    readers = [each for each in examined if "content" in each.facts]
    if not readers:
        return None
    told = [", ".join(f"{name} {value}" for name, value in each.facts["content"].items()) for each in readers]
    return require_same("the same everywhere", told, [each.host for each in readers], same=told[0])


def devices_row(examined: Sequence[Examined]) -> Row:
    """Unlike devices work, at the pace of the slowest."""
    row = require_same(
        "devices",
        [each.facts["device"] for each in examined],
        [each.host for each in examined],
        same=f"{len(examined)} x {examined[0].facts['device']}",
    )
    return Row(row.what, Mark.DOUBTFUL, row.said) if row.mark is Mark.BAD else row


def memory_rows(examined: Sequence[Examined]) -> list[Row]:
    """What each device and each host will hold, against what is free there. A CPU's device is the host."""
    counted = [each for each in examined if "needs" in each.facts]
    if not counted:
        return []
    if counted[0].facts["on_cpu"]:
        return [_memory_row("host memory", counted, ("device", "host"), _share_of_host)]
    return [
        _memory_row("device memory", counted, ("device",), lambda each: float(each.facts["free"])),
        _memory_row("host memory", counted, ("host",), _share_of_host),
    ]


def _share_of_host(each: Examined) -> float:
    return float(each.facts["host_free"] / each.facts["local_world"])


def _memory_row(
    what: str, counted: Sequence[Examined], kinds: tuple[str, ...], free: Callable[[Examined], float]
) -> Row:
    def needed(each: Examined) -> float:
        return float(sum(sum(each.facts["needs"][kind].values()) for kind in kinds))

    share = {each.rank: needed(each) / max(free(each), 1.0) for each in counted}
    worst = max(counted, key=lambda each: share[each.rank])
    parts = {name: size for kind in kinds for name, size in worst.facts["needs"][kind].items()}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    held = ", ".join(f"{name} {_size(size)}" for name, size in largest)
    said = f"rank {worst.rank} needs {_size(needed(worst))} of the {_size(free(worst))} that are free ({held})"
    highest = share[worst.rank]
    mark = Mark.BAD if highest > 1 else Mark.DOUBTFUL if highest > TIGHT else Mark.GOOD
    short = {each.host for each in counted if share[each.rank] > 1}
    nodes = short if short != {each.host for each in counted} else set()
    return Row(what, mark, said, tuple(sorted(nodes)))


def space_row(free: int, parameters: int, writes: Sequence[float]) -> Row:
    """Room for checkpoints on the disk of the run folder; `writes` are the nodes' bytes a second."""
    needed = int(CHECKPOINTS * STATE_BYTES * parameters * FREE_SPACE_MARGIN)
    said = f"{CHECKPOINTS} checkpoints need {_size(needed)}, {_size(free)} are free"
    if writes:
        said += f"; a node writes {spread([each / 1e6 for each in writes], 'MB/s')}"
    return Row("disk space", Mark.GOOD if free >= needed else Mark.BAD, said)


def clock_row(offsets: Sequence[float], hosts: Sequence[str]) -> Row:
    """Against rank 0's clock."""
    far = max(offsets, key=abs)
    if abs(far) < CLOCK_DOUBTFUL_SECONDS:
        return Row("clocks", Mark.GOOD, f"within {abs(far) * 1000:.0f} ms of rank 0's")
    bad = {host: offset for offset, host in zip(offsets, hosts, strict=True) if abs(offset) >= CLOCK_BAD_SECONDS}
    wrong = {host: offset for offset, host in zip(offsets, hosts, strict=True) if abs(offset) >= CLOCK_DOUBTFUL_SECONDS}
    told = some(f"{host} {offset:+.1f} s" for host, offset in sorted(wrong.items(), key=lambda item: -abs(item[1])))
    mark = Mark.BAD if bad else Mark.DOUBTFUL
    return Row("clocks", mark, f"against rank 0's: {told}: let the nodes ask a time server", tuple(sorted(bad)))


def products_row(examined: Sequence[Examined]) -> Row:
    """Who computes slower than the median rank."""
    timed = [each for each in examined if each.facts.get("product")]
    if not timed:
        return Row("products", Mark.BAD, "no rank could multiply")
    seconds = [each.facts["product"] for each in timed]
    median = statistics.median_low(seconds)
    behind = {timed[index].rank: median / seconds[index] for index in slow(seconds)}
    if not behind:
        return Row("products", Mark.GOOD, f"every rank within {SLOWER} of the median: {median * 1000:.2f} ms")
    hosts = {each.rank: each.host for each in timed}
    told = some(f"rank {rank} ({hosts[rank]}) computes at {behind[rank]:.2f} of the median" for rank in sorted(behind))
    if timed[0].facts["on_cpu"]:
        return Row("products", Mark.DOUBTFUL, told)
    return Row("products", Mark.BAD, told, tuple(sorted({hosts[rank] for rank in behind})))


def pairs_row(bandwidths: Mapping[Pair, float], hosts: Sequence[str], *, on_cpu: bool) -> Row:
    """Pairs of ranks that are slow beside others of their kind. A node is bad where its own ranks are slow with each
    other, or where it is slow with two other nodes: of two nodes that are slow with each other one cannot tell."""
    if not bandwidths:
        return Row("pairs of ranks", Mark.GOOD, "there is one rank")
    within = {pair: rate for pair, rate in bandwidths.items() if hosts[pair[0]] == hosts[pair[1]]}
    between = {pair: rate for pair, rate in bandwidths.items() if pair not in within}
    said, late, bad = [], [], set()
    for kind, rates in (("on a node", within), ("between nodes", between)):
        if not rates:
            continue
        said.append(f"{kind} {spread([rate / 1e9 for rate in rates.values()], 'GB/s')}")
        median = statistics.median_low(rates.values())
        behind = {pair: rate for pair, rate in rates.items() if rate * PAIR_SLOWER < median}
        late += [f"ranks {a} ({hosts[a]}) and {b} ({hosts[b]}) {rate / 1e9:.3g}" for (a, b), rate in behind.items()]
        bad |= _to_blame(list(behind), hosts)
    if not late:
        return Row("pairs of ranks", Mark.GOOD, "; ".join(said))
    mark = Mark.DOUBTFUL if on_cpu else Mark.BAD
    return Row("pairs of ranks", mark, f"slow: {some(late)}; {'; '.join(said)}", () if on_cpu else tuple(sorted(bad)))


def _to_blame(pairs: Sequence[Pair], hosts: Sequence[str]) -> set[str]:
    partners: dict[str, set[str]] = {}
    for a, b in pairs:
        partners.setdefault(hosts[a], set()).add(hosts[b])
        partners.setdefault(hosts[b], set()).add(hosts[a])
    return {host for host, others in partners.items() if host in others or len(others) > 1}


def _size(amount: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount / 1e3:.3g} kB"
