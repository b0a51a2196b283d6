"""Comparison of the ranks' facts: versions, contents, devices, memory, clocks and speed.

On a CPU, ranks share cores and memory with other processes, so slowness there is a warning, not a failure.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

from megadistill.distributed.measures.bandwidth import Pair
from megadistill.distributed.measures.group_latencies import Latencies
from megadistill.doctor.rank_report import RankReport, Row, Status, require_same, some, spread
from megadistill.train.checkpoint.versions import tried, untried
from megadistill.train.checkpoint.writer import FREE_SPACE_MARGIN
from megadistill.train.resilience.stragglers import SLOWER, slow
from megadistill.units import readable, short, spell

CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 60.0
"""Clock skew that is warned of, as logs cannot be compared, and that fails, as signed URLs and lock ages break."""
PAIR_SLOWER = 2.0
"""Multiple of the median time of its kind above which a pair of ranks is slow."""
CHECKPOINTS = 2
"""Checkpoints on disk at a time: the old one stays until the new one is complete."""
TIGHT = 0.9
"""Fraction of the free memory that is warned of, as a run takes more than is counted."""


def versions_row(reports: Sequence[RankReport]) -> Row:
    """Only versions that differ are listed by node. One that was not tried is a warning."""
    versions = [each.facts["versions"] for each in reports]
    unlike = [name for name in versions[0] if len({each.get(name) for each in versions}) > 1]
    values = [" ".join(f"{name} {each.get(name)}" for name in unlike) for each in versions]
    usual = ", ".join(f"{name} {version}" for name, version in versions[0].items())
    row = require_same("versions", values, reports, same=usual)
    outside = untried(versions[0], tried())
    return Row(row.check, Status.WARN, "; ".join(outside)) if outside and row.status is Status.OK else row


def contents_row(reports: Sequence[RankReport]) -> Row | None:
    """Fingerprints of recipe, data and teacher; None where no rank could read them."""
    readers = [each for each in reports if "content" in each.facts]
    if not readers:
        return None
    values = [
        ", ".join(f"{name} {value}" for name, value in each.facts["content"].items() if value) for each in readers
    ]
    return require_same("contents", values, readers, same=values[0])


def devices_row(reports: Sequence[RankReport]) -> Row:
    """Different devices are a warning: they work, at the pace of the slowest."""
    devices = [each.facts["device"] for each in reports]
    row = require_same("devices", devices, reports, same=f"{len(devices)} x {devices[0]}")
    return Row(row.check, Status.WARN, row.detail) if row.status is Status.FAIL else row


def memory_rows(reports: Sequence[RankReport]) -> list[Row]:
    """The memory that the run needs on each device and host, against the free memory. A CPU's device is the host."""
    counted = [each for each in reports if "needs" in each.facts]
    if not counted:
        return []
    if counted[0].facts["on_cpu"]:
        return [_memory_row("host memory", counted, ("device", "host"), _share_of_host)]
    return [
        _memory_row("device memory", counted, ("device",), lambda each: float(each.facts["free"])),
        _memory_row("host memory", counted, ("host",), _share_of_host),
    ]


def _share_of_host(each: RankReport) -> float:
    return float(each.facts["host_free"] / each.facts["local_world"])


def _memory_row(
    check: str, counted: Sequence[RankReport], kinds: tuple[str, ...], free: Callable[[RankReport], float]
) -> Row:
    def needed(each: RankReport) -> float:
        return float(sum(sum(each.facts["needs"][kind].values()) for kind in kinds))

    share = {each.rank: needed(each) / max(free(each), 1.0) for each in counted}
    worst = max(counted, key=lambda each: share[each.rank])
    parts = {name: size for kind in kinds for name, size in worst.facts["needs"][kind].items()}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    held = ", ".join(f"{name} {readable(size, 'B')}" for name, size in largest)
    need, available = readable(needed(worst), "B"), readable(free(worst), "B")
    detail = f"rank {worst.rank} needs {need} of the {available} that are free ({held})"
    highest = share[worst.rank]
    status = Status.FAIL if highest > 1 else Status.WARN if highest > TIGHT else Status.OK
    short = {each.host for each in counted if share[each.rank] > 1}
    nodes = short if short != {each.host for each in counted} else set()
    return Row(check, status, detail, tuple(sorted(nodes)))


def space_row(free: int, checkpoint: int, writes: Sequence[float], *, final: int) -> Row:
    """Free space on the run folder's disk, for checkpoints of these bytes; `writes`: bytes per second of each node.

    `final`: checkpoints that the complete run leaves. One more is there while it is written. A warning where the space
    suffices for a start only.
    """
    most = max(CHECKPOINTS, final + 1)
    needed, in_the_end = (int(number * checkpoint * FREE_SPACE_MARGIN) for number in (CHECKPOINTS, most))
    detail = f"{most} checkpoints at a time need {readable(in_the_end, 'B')}, {readable(free, 'B')} are free"
    status = Status.FAIL if free < needed else Status.WARN if free < in_the_end else Status.OK
    if status is not Status.OK:
        detail += ": free space, or keep fewer (checkpoint.keep_last, checkpoint.keep_every)"
    if writes:
        detail += f"; a node writes {spread([each / 1e6 for each in writes], 'MB/s')}"
    return Row("disk space", status, detail)


def clock_row(offsets: Sequence[float], hosts: Sequence[str]) -> Row:
    """Skew of each clock against rank 0's. `offsets`: seconds."""
    far = max(offsets, key=abs)
    if abs(far) < CLOCK_WARN_SECONDS:
        return Row("clocks", Status.OK, f"within {abs(far) * 1000:.0f} ms of rank 0's")
    bad = {host: offset for offset, host in zip(offsets, hosts, strict=True) if abs(offset) >= CLOCK_FAIL_SECONDS}
    wrong = {host: offset for offset, host in zip(offsets, hosts, strict=True) if abs(offset) >= CLOCK_WARN_SECONDS}
    skewed = some(f"{host} {offset:+.1f} s" for host, offset in sorted(wrong.items(), key=lambda item: -abs(item[1])))
    status = Status.FAIL if bad else Status.WARN
    return Row("clocks", status, f"against rank 0's: {skewed}: synchronize the nodes by NTP", tuple(sorted(bad)))


def products_row(reports: Sequence[RankReport]) -> Row:
    """Ranks whose matrix product takes longer than the median rank's."""
    timed = [each for each in reports if each.facts.get("product")]
    if not timed:
        return Row("matrix products", Status.FAIL, "failed on every rank")
    seconds = [each.facts["product"] for each in timed]
    median = statistics.median_low(seconds)
    behind = {timed[index].rank: median / seconds[index] for index in slow(seconds)}
    if not behind:
        ranks = f"every rank within {SLOWER} of the median: " if len(timed) > 1 else ""
        return Row("matrix products", Status.OK, f"{ranks}{spell(median)}")
    hosts = {each.rank: each.host for each in timed}
    slower = some(
        f"rank {rank} ({hosts[rank]}) computes at {behind[rank]:.2f} of the median" for rank in sorted(behind)
    )
    if timed[0].facts["on_cpu"]:
        return Row("matrix products", Status.WARN, slower)
    return Row("matrix products", Status.FAIL, slower, tuple(sorted({hosts[rank] for rank in behind})))


def latency_row(latencies: Latencies) -> Row:
    """Time of small collectives, in the form of a file for `plan --gpu`. Not judged: it depends on the cluster."""
    measured = ", ".join(
        f"{name}: {{{', '.join(f'{ranks}: {_microseconds(each)}' for ranks, each in by_ranks.items())}}}"
        for name, by_ranks in latencies.items()
    )
    return Row("latency", Status.OK, f"of small collectives over as many ranks, for plan: latency_us: {{{measured}}}")


def _microseconds(seconds: float) -> str:
    """Three digits, as YAML reads a number."""
    return f"{float(f'{1e6 * seconds:.3g}'):g}"


def pairs_row(bandwidths: Mapping[Pair, float], hosts: Sequence[str], *, on_cpu: bool) -> Row:
    """Pairs of ranks that are slow compared with others of their kind.

    A node is bad where its own ranks are slow with each other, or where it is slow with two other nodes: of two nodes
    that are slow with each other alone, either may be the cause.
    """
    if not bandwidths:
        return Row("pairs of ranks", Status.OK, "there is one rank")
    within = {pair: rate for pair, rate in bandwidths.items() if hosts[pair[0]] == hosts[pair[1]]}
    between = {pair: rate for pair, rate in bandwidths.items() if pair not in within}
    rates_by_kind, late, bad = [], [], set()
    for kind, rates in (("on a node", within), ("between nodes", between)):
        if not rates:
            continue
        rates_by_kind.append(f"{kind} {spread([rate / 1e9 for rate in rates.values()], 'GB/s')}")
        median = statistics.median_low(rates.values())
        behind = {pair: rate for pair, rate in rates.items() if rate * PAIR_SLOWER < median}
        late += [f"ranks {a} ({hosts[a]}) and {b} ({hosts[b]}) {short(rate / 1e9)}" for (a, b), rate in behind.items()]
        bad |= _suspects(list(behind), hosts)
    if not late:
        return Row("pairs of ranks", Status.OK, "; ".join(rates_by_kind))
    status = Status.WARN if on_cpu else Status.FAIL
    detail = f"slow: {some(late)}; {'; '.join(rates_by_kind)}"
    return Row("pairs of ranks", status, detail, () if on_cpu else tuple(sorted(bad)))


def _suspects(pairs: Sequence[Pair], hosts: Sequence[str]) -> set[str]:
    partners: dict[str, set[str]] = {}
    for a, b in pairs:
        partners.setdefault(hosts[a], set()).add(hosts[b])
        partners.setdefault(hosts[b], set()).add(hosts[a])
    return {host for host, others in partners.items() if host in others or len(others) > 1}
