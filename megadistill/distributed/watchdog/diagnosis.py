"""Hang diagnosis: which rank holds up a run, from the heartbeats of all ranks.

The rank to name is the one *outside* of the collective: those that wait in it are as late as it is. A rank is outside
when its stack shows no wait for other ranks, or when it has joined fewer collectives than others of its group
(`stack_probe`).
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from megadistill.redaction import printable

LOST = "lost"
"""The `end` of a rank whose collective failed because of another rank."""

STALE_SECONDS = 3.0
"""Age (s) from which an unchanged heartbeat means that its process was killed or is frozen."""

GRACE_SECONDS = 10.0
"""Time (s) between a rank's failure and the abort of all others: they may notice by themselves and know more."""


MAX_TEXT = 64 << 10
"""Bytes of the longest heartbeat or decision that is read."""


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, published about once a second."""

    host: str
    pid: int
    tick: int = 0
    """Number of this heartbeat."""
    phase: str = "start"
    step: int = 0
    """Current optimizer step; 0 outside of one."""
    seconds: float = 0.0
    """Time (s) since the phase began."""
    limit: float | None = None
    """Time limit (s) of the phase; None for a phase that waits for requests."""
    is_waiting: bool = False
    """Whether the stack shows a wait for other ranks."""
    location: str = ""
    """File, line and function of the main thread."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Number of collectives joined, by group."""
    end: str | None = None
    """Reason why the rank ends: `LOST`, or its own error."""

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> "Heartbeat | None":
        """The heartbeat that a rank has published; None: it is none, so another program has written there."""
        try:
            heartbeat = _HEARTBEAT.validate_json(text) if len(text) <= MAX_TEXT else None
        except ValueError:
            return None
        if heartbeat is None:
            return None
        return replace(
            heartbeat,
            host=printable(heartbeat.host),
            phase=printable(heartbeat.phase),
            location=printable(heartbeat.location),
            end=None if heartbeat.end is None else printable(heartbeat.end),
        )

    @property
    def is_late(self) -> bool:
        return self.limit is not None and self.seconds > self.limit


_HEARTBEAT = TypeAdapter(Heartbeat)


class Decision(TypedDict):
    """Rank 0 publishes one about once a second."""

    tick: int
    abort: str | None
    """Reason to abort the run."""
    grace: float
    """Time (s) until then."""
    lost_rank: str | None


_DECISION = TypeAdapter(Decision)


def read_decision(text: str | bytes) -> Decision | None:
    """The decision of rank 0; None: it is none, so another program has written there."""
    try:
        decision = _DECISION.validate_json(text) if len(text) <= MAX_TEXT else None
    except ValueError:
        return None
    if decision is None:
        return None
    texts = (decision["abort"], decision["lost_rank"])
    abort, lost_rank = (None if text is None else printable(text) for text in texts)
    return {"tick": decision["tick"], "abort": abort, "grace": decision["grace"], "lost_rank": lost_rank}


Heartbeats = Mapping[int, Heartbeat]
"""Rank of the launch -> its last heartbeat."""


class HangDetector:
    """Decides from the heartbeats of all ranks when a run must be aborted, and names the rank to blame.

    `silence`: age (s) of a heartbeat from which its rank counts as dead. `period`: time (s) between two updates.
    """

    def __init__(self, *, silence: float, period: float) -> None:
        self._silence = silence
        self._period = period
        self._latest: dict[int, tuple[Heartbeat, float]] = {}
        """Rank -> its heartbeat, and when it was new."""
        self._updated: float | None = None
        self._suspects: list[int] | None = None

    def update(self, heartbeats: Heartbeats, now: float, *, hangs: bool = True) -> str | None:
        """The reason to abort the run, or None. `now` (s) is a monotonic clock; `hangs`: whether a hang is a reason."""
        if self._updated is not None and now - self._updated > 5 * self._period:
            self._latest.clear()  # this process was frozen itself, and so perhaps were all
        self._updated = now
        for rank, heartbeat in heartbeats.items():
            before = self._latest.get(rank)
            if before is None or (before[0].tick, before[0].end) != (heartbeat.tick, heartbeat.end):
                self._latest[rank] = (heartbeat, now)
        return self._failed_rank(now) or self._dead_rank(now) or (self._hang(now) if hangs else None)

    def lost_rank(self, now: float) -> str | None:
        """The rank behind a broken connection: the first that ended with an error, or that has no heartbeat."""
        for rank, (heartbeat, _) in self._latest.items():
            if heartbeat.end is not None and heartbeat.end != LOST:
                return f"{_name(rank, heartbeat)}: {heartbeat.end}"
        for rank, (heartbeat, since) in self._latest.items():
            if heartbeat.end is None and now - since > max(STALE_SECONDS, 2 * self._period):
                return f"{_name(rank, heartbeat)}: no heartbeat for {now - since:.0f} s, last seen {_state(heartbeat)}"
        return None

    def _failed_rank(self, now: float) -> str | None:
        failed = [
            (heartbeat.end == LOST, rank)  # an error says more than a lost connection
            for rank, (heartbeat, since) in self._latest.items()
            if heartbeat.end is not None and now - since > GRACE_SECONDS
        ]
        if not failed:
            return None
        is_lost, rank = min(failed)
        heartbeat, _ = self._latest[rank]
        reason = "lost another rank" if is_lost else f"failed: {heartbeat.end}"
        return f"{_name(rank, heartbeat)} {reason}; the other ranks cannot continue without it"

    def _dead_rank(self, now: float) -> str | None:
        for rank, (heartbeat, since) in sorted(self._latest.items()):
            if heartbeat.end is None and now - since > silence_limit(self._silence, heartbeat.limit):
                return dead_rank_message(rank, heartbeat, now - since)
        return None

    def _hang(self, now: float) -> str | None:
        """Two updates in a row must name the same ranks: a rank may just pass from one collective to the next."""
        ages = {rank: now - since for rank, (heartbeat, since) in self._latest.items() if heartbeat.end is None}
        heartbeats = {}
        for rank, age in ages.items():
            heartbeat, _ = self._latest[rank]
            heartbeats[rank] = replace(heartbeat, seconds=heartbeat.seconds + age)
        suspects, before = stalled_ranks(heartbeats), self._suspects
        self._suspects = suspects
        if suspects is None or suspects != before:
            return None
        if not suspects:
            return _unexplained_message(heartbeats)
        rank = suspects[0]
        if ages[rank] > STALE_SECONDS + self._period:
            return dead_rank_message(rank, heartbeats[rank], ages[rank])
        return _stuck_message(suspects, heartbeats)


def stalled_ranks(heartbeats: Heartbeats) -> list[int] | None:
    """The ranks that hold up a run in which a rank is late; [] where none differs from the others; None: no hang.

    Ranks that wait for one that is busy within the limit of its own phase (it saves, it starts up) are excused for as
    long as that limit.
    """
    late = {rank: heartbeat for rank, heartbeat in heartbeats.items() if heartbeat.is_late}
    if not late:
        return None
    outside = _ranks_outside(heartbeats)
    if not outside:
        return _lagging_ranks(heartbeats, late)
    if late_outside := [rank for rank in outside if rank in late]:
        return late_outside
    longest = max((limit for rank in outside if (limit := heartbeats[rank].limit) is not None), default=0.0)
    if max(heartbeat.seconds for heartbeat in late.values()) <= longest:
        return None
    return [rank for rank in outside if heartbeats[rank].limit is None] or outside


def _ranks_outside(heartbeats: Heartbeats) -> list[int]:
    """Ranks outside of the collective that others are in, or wait to be joined in; empty where all are alike."""
    behind = _ranks_behind(heartbeats)
    busy = [rank for rank, heartbeat in sorted(heartbeats.items()) if not heartbeat.is_waiting]
    if busy_and_behind := [rank for rank in busy if rank in behind]:
        return busy_and_behind
    return busy if 0 < len(busy) < len(heartbeats) else behind


def _ranks_behind(heartbeats: Heartbeats) -> list[int]:
    """Ranks that have joined the fewest collectives of a group whose ranks differ."""
    behind: set[int] = set()
    for group in {group for heartbeat in heartbeats.values() for group in heartbeat.collectives}:
        counts = {rank: each.collectives[group] for rank, each in heartbeats.items() if group in each.collectives}
        fewest = min(counts.values())
        if fewest < max(counts.values()):
            behind.update(rank for rank, count in counts.items() if count == fewest)
    return sorted(behind)


def _lagging_ranks(heartbeats: Heartbeats, late: Heartbeats) -> list[int]:
    """Among ranks that are alike: the only late ones, those in the lowest of several steps, or those in a rare place.

    The last rule is for accelerators: the host waits for its device, most of them at one line.
    """
    lowest = min(heartbeat.step for heartbeat in late.values())
    crowd, size = Counter(heartbeat.location for heartbeat in late.values()).most_common(1)[0]
    slow = sorted(rank for rank, heartbeat in late.items() if heartbeat.step == lowest)
    apart = sorted(rank for rank, heartbeat in late.items() if heartbeat.location != crowd)
    if len(slow) < sum(heartbeat.limit is not None for heartbeat in heartbeats.values()) or len(heartbeats) == 1:
        return slow
    return apart if 2 * size > len(late) else []


def silence_limit(silence: float, limit: float | None) -> float:
    """Age (s) of a heartbeat from which its rank counts as dead, in a phase with the time limit `limit` (s)."""
    return max(STALE_SECONDS, silence if limit is None else min(silence, limit))


def dead_rank_message(rank: int, heartbeat: Heartbeat | None, seconds: float) -> str:
    """A line about a rank without heartbeat for `seconds`; `heartbeat` is its last one, if it is known."""
    seen = "" if heartbeat is None else f" ({_address(heartbeat)}), last seen {_state(heartbeat)}"
    return f"no heartbeat from rank {rank} for {seconds:.0f} s: it was killed or is frozen{seen}"


def _stuck_message(ranks: list[int], heartbeats: Heartbeats) -> str:
    first = heartbeats[ranks[0]]
    contrast = "waits elsewhere than" if first.is_waiting else "is not in the collective of"
    others = "" if len(heartbeats) == 1 else f" and {contrast} the others"
    more = f"; so are ranks {_join(ranks[1:])}" if len(ranks) > 1 else ""
    return f"{_name(ranks[0], first)} is stuck{others}: {_state(first)} for {first.seconds:.0f} s{more}"


def _unexplained_message(heartbeats: Heartbeats) -> str:
    rank, latest = max(heartbeats.items(), key=lambda item: item[1].seconds if item[1].is_late else -1.0)
    return (
        f"all {len(heartbeats)} ranks look alike, so none can be named: {_state(latest)} for {latest.seconds:.0f} s on "
        f"rank {rank}; check the network and the stacks"
    )


def _state(heartbeat: Heartbeat) -> str:
    step = f" of step {heartbeat.step}" if heartbeat.step else ""
    return f"in {heartbeat.phase}{step} at {heartbeat.location}"


def _name(rank: int, heartbeat: Heartbeat) -> str:
    return f"rank {rank} ({_address(heartbeat)})"


def _address(heartbeat: Heartbeat) -> str:
    return f"{heartbeat.host}, process {heartbeat.pid}"


def _join(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text if len(ranks) <= 8 else f"{text} and {len(ranks) - 8} more"
