"""Who holds up a run: a decision from what every rank says of itself. It knows no clock, no threads and no store.

The rank that is *not* in the collective is the one to name: those that wait in it are as late as it is. A rank counts
as outside when its frames say so, or when it has joined fewer collectives than others of its group (`whereabouts`).
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

LOST = "lost"
"""The `end` of a rank whose collective failed because of another rank."""

STALE_SECONDS = 3.0
"""A sign that has not changed for so long is no longer news of a rank: it was killed, or is frozen."""

GRACE_SECONDS = 10.0
"""From a rank's own end to the end of all: its peers may notice by themselves, and say more."""


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself, about once a second."""

    host: str
    pid: int
    beat: int = 0
    phase: str = "start"
    step: int = 0
    seconds: float = 0.0
    """Since the phase began."""
    limit: float | None = None
    """Seconds that the phase may take; None: as long as it likes, since it serves others."""
    waits: bool = False
    """For other ranks, as far as its frames show."""
    place: str = ""
    joined: dict[str, int] = field(default_factory=dict)
    """Collectives that it has joined, by group."""
    end: str | None = None
    """Why it ends: `LOST`, or its own reason."""

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> "Sign":
        return cls(**json.loads(text))

    @property
    def late(self) -> bool:
        return self.limit is not None and self.seconds > self.limit


class Observer:
    """Sees the signs of all ranks again and again, and says when the run has to end, and because of whom.

    `silence`: seconds without a new sign after which a rank is taken for dead. `period`: seconds between looks.
    """

    def __init__(self, *, silence: float, period: float) -> None:
        self._silence = silence
        self._period = period
        self._changed: dict[int, tuple[Sign, float]] = {}
        self._looked: float | None = None
        self._suspected: list[int] | None = None

    def look(self, signs: Mapping[int, Sign], now: float) -> str | None:
        """Why the run has to end; None: it need not. `now` is a clock that only goes forward."""
        if self._looked is not None and now - self._looked > 5 * self._period:
            self._changed.clear()  # this process was frozen itself, and so perhaps were all
        self._looked = now
        for rank, sign in signs.items():
            before = self._changed.get(rank)
            if before is None or before[0].beat != sign.beat or before[0].end != sign.end:
                self._changed[rank] = (sign, now)
        return self._ended(now) or self._silent(now) or self._stalled(now)

    def missing(self, now: float) -> str | None:
        """Whom ranks lost that notice a broken connection: who ended first for a reason, or shows no sign of life."""
        for rank, (sign, _) in self._changed.items():
            if sign.end is not None and sign.end != LOST:
                return f"{_named(rank, sign)}, which says: {sign.end}"
        for rank, (sign, since) in self._changed.items():
            if sign.end is None and now - since > max(STALE_SECONDS, 2 * self._period):
                return f"{_named(rank, sign)}: no sign of life for {now - since:.0f} s, last seen {_last(sign)}"
        return None

    def _ended(self, now: float) -> str | None:
        ended = [
            (sign.end == LOST, rank) for rank, (sign, since) in self._changed.items() if self._over(sign, since, now)
        ]
        if not ended:
            return None
        _, rank = min(ended)  # a reason says more than a loss
        sign, _ = self._changed[rank]
        reason = "lost another rank" if sign.end == LOST else f"failed: {sign.end}"
        return f"{_named(rank, sign)} {reason}; the others cannot go on without it"

    def _over(self, sign: Sign, since: float, now: float) -> bool:
        return sign.end is not None and now - since > GRACE_SECONDS

    def _silent(self, now: float) -> str | None:
        for rank, (sign, since) in sorted(self._changed.items()):
            if sign.end is None and now - since > silence_limit(self._silence, sign.limit):
                return silent_rank(rank, sign, now - since)
        return None

    def _stalled(self, now: float) -> str | None:
        """Two looks in a row must name the same ranks: a rank may just be passing between two collectives."""
        unchanged = {rank: now - since for rank, (sign, since) in self._changed.items() if sign.end is None}
        signs = {
            rank: replace(sign, seconds=sign.seconds + now - since)
            for rank, (sign, since) in self._changed.items()
            if sign.end is None
        }
        named = stalled(signs)
        confirmed, self._suspected = named is not None and named == self._suspected, named
        if named is None or not confirmed:
            return None
        if not named:
            return _nobody(signs)
        rank = named[0]
        if unchanged[rank] > STALE_SECONDS + self._period:
            return silent_rank(rank, signs[rank], unchanged[rank])
        return _stuck(named, signs)


def stalled(signs: Mapping[int, Sign]) -> list[int] | None:
    """The ranks that hold up a run in which some rank is late; empty: none can be told from the others; None: no hang.

    Ranks that wait for one that is busy within the limit of its own phase (it saves, it starts up) are excused for as
    long as that limit.
    """
    late = {rank: sign for rank, sign in signs.items() if sign.late}
    if not late:
        return None
    outside = _outside(signs)
    if not outside:
        return _lagging(signs, late)
    if found := [rank for rank in outside if rank in late]:
        return found
    longest = max((limit for rank in outside if (limit := signs[rank].limit) is not None), default=0.0)
    if max(sign.seconds for sign in late.values()) <= longest:
        return None
    return [rank for rank in outside if signs[rank].limit is None] or outside


def _outside(signs: Mapping[int, Sign]) -> list[int]:
    """Ranks outside of the collective that others are in, or wait to be joined in; empty where all are alike."""
    behind = _behind(signs)
    busy = [rank for rank, sign in sorted(signs.items()) if not sign.waits]
    if found := [rank for rank in busy if rank in behind]:
        return found
    return busy if 0 < len(busy) < len(signs) else behind


def _behind(signs: Mapping[int, Sign]) -> list[int]:
    """Those that have joined the fewest collectives of a group whose ranks differ."""
    found: set[int] = set()
    for group in {group for sign in signs.values() for group in sign.joined}:
        counts = {rank: sign.joined[group] for rank, sign in signs.items() if group in sign.joined}
        fewest = min(counts.values())
        if fewest < max(counts.values()):
            found.update(rank for rank, count in counts.items() if count == fewest)
    return sorted(found)


def _lagging(signs: Mapping[int, Sign], late: Mapping[int, Sign]) -> list[int]:
    """Of ranks that are alike: the only late ones; those in the lowest of several steps; or where few others are.

    The last rule is for accelerators: the host waits for its device, most of them at one line.
    """
    lowest = min(sign.step for sign in late.values())
    crowd, size = Counter(sign.place for sign in late.values()).most_common(1)[0]
    slow = sorted(rank for rank, sign in late.items() if sign.step == lowest)
    apart = sorted(rank for rank, sign in late.items() if sign.place != crowd)
    if len(slow) < sum(sign.limit is not None for sign in signs.values()) or len(signs) == 1:
        return slow
    return apart if 2 * size > len(late) else []


def silence_limit(silence: float, limit: float | None) -> float:
    """Seconds without a sign after which a rank is taken for dead, in a phase that may take `limit`."""
    return max(STALE_SECONDS, silence if limit is None else min(silence, limit))


def silent_rank(rank: int, sign: Sign | None, seconds: float) -> str:
    """A line: the rank shows no sign of life; `sign` is the last one, if it is known."""
    seen = "" if sign is None else f" ({_address(sign)}), last seen {_last(sign)}"
    return f"no sign of life from rank {rank} for {seconds:.0f} s: it was killed or is frozen{seen}"


def _stuck(ranks: list[int], signs: Mapping[int, Sign]) -> str:
    first = signs[ranks[0]]
    alone = len(signs) == 1
    does = "waits elsewhere than" if first.waits else "is not in the collective of"
    others = "" if alone else f" and {does} the others"
    more = f"; so are ranks {_listed(ranks[1:])}" if len(ranks) > 1 else ""
    return f"{_named(ranks[0], first)} is stuck{others}: {_last(first)} for {first.seconds:.0f} s{more}"


def _nobody(signs: Mapping[int, Sign]) -> str:
    rank = max(signs, key=lambda rank: signs[rank].seconds if signs[rank].late else -1.0)
    sign = signs[rank]
    return (
        f"all {len(signs)} ranks stand alike and none can be named: {_last(sign)} for {sign.seconds:.0f} s on rank "
        f"{rank}; look at the network, and at the stacks"
    )


def _last(sign: Sign) -> str:
    return f"in {sign.phase} of step {sign.step} at {sign.place}" if sign.step else f"in {sign.phase} at {sign.place}"


def _named(rank: int, sign: Sign) -> str:
    return f"rank {rank} ({_address(sign)})"


def _address(sign: Sign) -> str:
    return f"{sign.host}, process {sign.pid}"


def _listed(ranks: Iterable[int]) -> str:
    shown = list(ranks)
    text = ", ".join(map(str, shown[:8]))
    return text if len(shown) <= 8 else f"{text} and {len(shown) - 8} more"
