"""The members of a run of replicas that are launches of their own: who is here, and from when on.

Each replica is a launch as any other, with ranks, a watchdog and an end of its own. What joins them is a store outside
of all replicas (`store_server`). The run goes through *epochs*: in each the same replicas take all steps together. An
epoch ends when one of them is lost, or when a new one waits to join; then every living replica says how far it has
come, the first of them decides who belongs to the next epoch, and all make new groups across replicas. Whoever is
behind, or new, gets the student's state from one that is furthest (`train.replicas`).

The first rank of a replica, its leader, speaks for it. When its process ends, its connections to the other leaders are
closed, which they see at once. Its heartbeat is a counter in the store: no clocks of two hosts are compared. A leader
that was frozen finds itself left out of the next epoch, and ends; its launcher starts it again.

Keys of the store: `arrivals`, `arrival/N` (leaders in the order in which they came), `beat/M`, `gone/M`, `joins/M` (of
member M), `ready/E/M` (its steps, for epoch E), `epoch/E` (its members), `broken/E` (why epoch E has ended), `ended`.
"""

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from megadistill.distributed.collectives import all_true, broadcast_object
from megadistill.distributed.groups.guard import Guard
from megadistill.distributed.groups.presence import Presence
from megadistill.distributed.groups.unregistered import unregistered_group
from megadistill.distributed.launch import SeparateReplica
from megadistill.distributed.rendezvous import await_answer, require_address
from megadistill.distributed.topology import Topology
from megadistill.errors import RestartFault, UserError
from megadistill.io import parse_json
from megadistill.redaction import printable
from megadistill.units import number_of

logger = logging.getLogger(__name__)

WAITS_FOR_RANKS = True
"""A thread with a frame of this module waits for other ranks (see `watchdog.stack_probe`)."""

HEARTBEAT_SECONDS = 0.25
SILENCE_SECONDS = 10.0
"""Time (s) without a heartbeat after which a replica is lost whose connection is open: its host is gone, or frozen."""
LOOK_SECONDS = 0.05
FOREVER = timedelta(days=365)
STOPPED = {"problem": "stopped while it waited for the other replicas of the student, before it had taken a step"}


@dataclass(frozen=True)
class Member:
    """One start of a replica."""

    id: str
    replica: int
    """Its number in the launch."""
    host: str
    address: str
    """Address of its leader, see `Presence`."""
    ranks: int
    steps: int
    """Steps that its student has taken, when the epoch was decided; -1: it has no student yet."""


@dataclass(frozen=True)
class Epoch:
    """Replicas that take steps together, in the order of their places."""

    number: int
    members: tuple[Member, ...]
    topology: Topology
    """Topology of this rank, in it."""
    lost: tuple[Member, ...]
    """Members of the epoch before that are in this one no longer."""
    joined: tuple[Member, ...]
    """Members that were not in the epoch before; of the first one none."""

    @property
    def furthest(self) -> int:
        """Place of a member whose student has taken the most steps."""
        return max(range(len(self.members)), key=lambda place: self.members[place].steps)

    @property
    def needs_state(self) -> bool:
        """Whether a member has not the furthest state."""
        return len({member.steps for member in self.members}) > 1


class Members:
    """This replica's part in the run's epochs. Methods are collective over the replica, in the main thread.

    Args:
        separate: this replica's place in the launch, and the store.
        alone: the topology of this replica alone.
        minimum: the fewest replicas with which the run goes on.
    """

    def __init__(self, separate: SeparateReplica, alone: Topology, *, minimum: int) -> None:
        self._separate, self._alone, self._minimum = separate, alone, minimum
        self.is_stopped: Callable[[], bool] = lambda: False
        """Whether this process was asked to stop, which the leader obeys while it waits for the first epoch."""
        self._timeout = alone.timeout or timedelta(minutes=10)
        self._leads = alone.shard_rank == 0
        self._store: Any = _connect(separate, self._timeout)
        self._id = broadcast_object(f"{separate.replica}-{secrets.token_hex(8)}", alone.shard_group)
        self._epoch: Epoch | None = None
        self._guard: Guard | None = None
        self._across: ProcessGroup | None = None
        self._lost = set[str]()
        """Members whose leader is silent, or has left."""
        self._waiting = set[str]()
        """Members that wait to join."""
        self._closed = threading.Event()
        if self._leads:
            self._presence = Presence((separate.host, separate.port))
            host, address, ranks = socket.gethostname(), self._presence.address, alone.shard_world
            own = Member(self._id, separate.replica, host, address, ranks, -1)
            self._store.set(f"beat/{self._id}", "0")
            self._store.set(f"arrival/{self._store.add('arrivals', 1)}", json.dumps(asdict(own)))
            threading.Thread(target=self._send_heartbeats, name="members beat", daemon=True).start()
        self.joins = broadcast_object(self._leads and self._store.check(["epoch/1"]), alone.shard_group)
        """Whether the run had begun when this replica came."""

    @property
    def somebody_waits(self) -> bool:
        """Whether a replica waits to join, as the leader of the first one knows."""
        epoch = self._epoch  # the look may be older than it
        known = set[str]() if epoch is None else {member.id for member in epoch.members}
        return not self._waiting <= known

    def next_epoch(self, steps: int) -> Epoch | None:
        """Ends the epoch and begins the next one, of which this replica is a member; None: the run has ended.

        `steps`: that this replica's student has taken; -1: it has none.

        Raises:
            UserError: a replica has another number of ranks.
            RestartFault: too few replicas are left, or this one was left out.
        """
        self._end_epoch()
        self._alone.watchdog.waits_for_replicas = True
        try:
            return self._next_epoch(steps)
        finally:
            self._alone.watchdog.waits_for_replicas = False

    def _next_epoch(self, steps: int) -> Epoch | None:
        number = None if self._epoch is None else self._epoch.number + 1
        while True:
            record = broadcast_object(self._led(number, steps) if self._leads else None, self._alone.shard_group)
            assert record is not None
            if "ended" in record:
                return None
            if "problem" in record:
                raise (UserError if record.get("is_input") else RestartFault)(str(record["problem"]))
            epoch, across, guard = self._join_groups(record)
            if epoch is not None:
                self._epoch, self._guard, self._across = epoch, guard, across
                return epoch
            number = int(record["number"]) + 1  # another one was lost meanwhile

    def close(self, *, ended: bool) -> None:
        """Leaves the run. `ended`: it has taken its last step, or was stopped, on all replicas."""
        with suppress(RuntimeError, dist.DistError):
            if not ended:
                self._end_epoch()
            elif self._leads:
                self._await_others()
                self._store.set("ended", "1")
            if self._leads:
                self._store.set(f"gone/{self._id}", "1")
        self._closed.set()

    def _await_others(self) -> None:
        """Waits for the replicas that read the last message of this one: a connection that is closed may lose it."""
        self._store.set(f"end/{self._id}", "1")
        others = [] if self._epoch is None else [each.id for each in self._epoch.members if each.id != self._id]
        while any(each not in self._lost and not self._store.check([f"end/{each}"]) for each in others):
            time.sleep(LOOK_SECONDS)

    # The end of an epoch

    def _end_epoch(self) -> None:
        if self._epoch is None or self._guard is None:
            return
        self._break_off(self._epoch.number, "its members change")
        self._guard.broken.set()
        if self._across is not None:
            with suppress(RuntimeError, dist.DistError):
                self._across.abort()

    # The decision

    def _led(self, number: int | None, steps: int) -> dict[str, Any]:
        try:
            return self._decided(number, steps)
        except (RuntimeError, dist.DistError) as error:
            why = printable(str(error).splitlines()[0])[:200]
            return {"problem": f"the store of the replicas at {printable(self._separate.store)} is gone ({why})"}

    def _decided(self, number: int | None, steps: int) -> dict[str, Any]:
        """The leader: the record of the next epoch; of one that joins, the first that it is a member of."""
        deadline = time.monotonic() + self._timeout.total_seconds()
        if number is None and self.joins:
            return self._awaited()
        number = 1 if number is None else number
        self._store.set(f"ready/{number}/{self._id}", str(steps))
        while True:
            if self._store.check([f"epoch/{number}"]):
                return self._checked(self._record(number))
            if self._has_ended():
                return {"ended": True}
            if self._epoch is None and self.is_stopped():
                return STOPPED
            candidates = self._candidates(number, late=time.monotonic() > deadline)
            if candidates and candidates[0].id == self._id:
                self._decide(number, candidates)
            time.sleep(LOOK_SECONDS)

    def _awaited(self) -> dict[str, Any]:
        """One that joins: waits for an epoch with it, while the run goes on."""
        number, members = 1, list[str]()
        while True:
            if self._store.check(["ended"]):
                return {"ended": True}
            if self.is_stopped():
                return STOPPED
            while self._store.check([f"epoch/{number}"]):
                record = self._record(number)
                members = [member["id"] for member in record["members"]]
                if self._id in members or "problem" in record:
                    return record
                if problem := self._unlike(record):
                    return problem
                self._store.set(f"joins/{self._id}", "1")
                number += 1
            if all(member in self._lost for member in members):
                return {"problem": "no replica is alive of the run that this one was to join: start all of them again"}
            time.sleep(LOOK_SECONDS)

    def _has_ended(self) -> bool:
        """Whether a member has taken the last step of the run."""
        members = () if self._epoch is None else self._epoch.members
        return any(self._store.check([f"end/{member.id}"]) for member in members)

    def _record(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] = parse_json(self._store.get(f"epoch/{number}"))
        return record

    def _candidates(self, number: int, *, late: bool) -> list[Member] | None:
        """The members of an epoch that can begin now, in the order of their places; None: not yet.

        `late`: the time limit of a start has passed.
        """
        arrived = _arrived(self._store)
        if number == 1:
            here = [member for member in arrived if member.id not in self._lost]
            ready = [member for member in here if self._store.check([f"ready/1/{member.id}"])]
            newest = {member.replica: member for member in ready}  # a replica that was started twice: its last start
            if len(newest) < self._separate.replicas and not late:
                return None
            members = [newest[replica] for replica in sorted(newest)]
            joins: list[Member] = []
        else:
            assert self._epoch is not None
            members = [member for member in self._epoch.members if member.id not in self._lost]
            if not all(self._store.check([f"ready/{number}/{member.id}"]) for member in members):
                return None
            joins = [each for each in arrived if self._wants_in(each, members)]
        return [*self._with_steps(members, number), *joins]

    def _wants_in(self, member: Member, members: Sequence[Member]) -> bool:
        known = any(member.id == each.id for each in members)
        return not known and self._store.check([f"joins/{member.id}"]) and member.id not in self._lost

    def _with_steps(self, members: Sequence[Member], number: int) -> list[Member]:
        return [replace(each, steps=int(self._store.get(f"ready/{number}/{each.id}"))) for each in members]

    def _decide(self, number: int, members: Sequence[Member]) -> None:
        """Writes the record of an epoch, unless another leader has."""
        record: dict[str, Any] = {"number": number, "members": [asdict(member) for member in members]}
        if len(members) < self._minimum:
            record["problem"] = (
                f"{number_of(len(members), 'replica')} of the student left, and distributed.min_replicas is "
                f"{self._minimum}: start the run again with more"
            )
        self._store.compare_set(f"epoch/{number}", "", json.dumps(record))

    def _unlike(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The problem of a replica that has not as many ranks as the members of an epoch."""
        sizes = {int(member["ranks"]): int(member["replica"]) for member in record["members"]}
        own = self._alone.shard_world
        if all(size == own for size in sizes):
            return None
        size, replica = next((size, replica) for size, replica in sizes.items() if size != own)
        counts = f"replica {self._separate.replica} has {number_of(own, 'rank')}, replica {replica} has {size}"
        return {"problem": f"{counts}: launch all replicas with equally many ranks", "is_input": True}

    def _checked(self, record: dict[str, Any]) -> dict[str, Any]:
        if record["number"] == 1 and (problem := self._unlike(record)):
            return problem
        if "problem" not in record and all(member["id"] != self._id for member in record["members"]):
            return {"problem": "this replica was silent too long and was left out: start it again, and it joins"}
        return record

    # The groups of an epoch

    def _join_groups(self, record: dict[str, Any]) -> tuple[Epoch | None, ProcessGroup | None, Guard | None]:
        """This rank's epoch; None on every rank of the replica where one of them cannot reach its peers."""
        members = tuple(Member(**values) for values in record["members"])
        number, place = int(record["number"]), [member.id for member in members].index(self._id)
        before = () if self._epoch is None else self._epoch.members
        guard = Guard(lambda reason: self._break_off(number, reason), waiting=self._waits)
        ids, former = {each.id for each in members}, {each.id for each in before}
        epoch = Epoch(
            number,
            members,
            self._alone,
            lost=tuple(each for each in before if each.id not in ids),
            joined=tuple(each for each in members if former and each.id not in former),
        )
        self._epoch = epoch  # its members are watched from here on
        across = self._made_group(number, place, len(members)) if len(members) > 1 else None
        made = across is not None or len(members) == 1
        if not all_true(made, self._alone.device, self._alone.shard_group):
            self._break_off(number, "a rank has not reached its peers")
            return None, None, None
        if across is not None:
            store = self._store.clone()
            guard.watch(across, lambda: store.wait([f"broken/{number}"], FOREVER))
        epoch = replace(epoch, topology=self._alone.with_replicas(place, len(members), across, guard))
        return epoch, across, guard

    def _made_group(self, number: int, place: int, replicas: int) -> ProcessGroup | None:
        """The group across replicas of an epoch; None where a member is lost before all have met in it.

        It is made by a thread: a rank that waits there for a lost one cannot be interrupted, and is left behind in it.
        """
        alone, made = self._alone, list[ProcessGroup]()
        shard, n, store = alone.shard_rank, alone.shard_world, self._store.clone()

        def make() -> None:
            name = f"across_{number}_{shard}"
            places = range(shard, n * replicas, n)
            with suppress(RuntimeError, dist.DistError):
                made.append(
                    unregistered_group(
                        PrefixStore(name, store), place, places, self._timeout, device=alone.device, name=name
                    )
                )

        thread = threading.Thread(target=make, name="members meet", daemon=True)
        thread.start()
        while thread.is_alive() and not self._store.check([f"broken/{number}"]):
            thread.join(LOOK_SECONDS)
        return made[0] if made else None

    def _break_off(self, number: int, reason: str) -> None:
        """Says that an epoch has ended, to all ranks of all its members."""
        with suppress(RuntimeError, dist.DistError):
            self._store.set(f"broken/{number}", reason)

    def _waits(self, begins: bool) -> None:
        self._alone.watchdog.waits_for_replicas = begins

    # The leader's thread

    def _send_heartbeats(self) -> None:
        """Counts this replica's heartbeat, and looks at those of the others."""
        store, count = self._store.clone(), 0
        seen: dict[str, tuple[bytes, float]] = {}
        while not self._closed.wait(HEARTBEAT_SECONDS):
            count += 1
            try:
                store.set(f"beat/{self._id}", str(count))
                self._look(store, seen)
            except (RuntimeError, dist.DistError) as error:  # the main thread finds it as well, when it needs the store
                logger.warning("the store of the replicas at %s does not answer: %s", self._separate.store, error)
                return

    def _look(self, store: Any, seen: dict[str, tuple[bytes, float]]) -> None:
        """Finds the members that are silent, and those that wait."""
        others = [member for member in _arrived(store) if member.id not in {self._id, *self._lost}]
        now = time.monotonic()
        for member in others:
            heartbeat = bytes(store.get(f"beat/{member.id}"))
            before = seen.get(member.id)
            if before is None or before[0] != heartbeat:
                before = seen[member.id] = (heartbeat, now)
            is_silent = now - before[1] > SILENCE_SECONDS
            if is_silent or self._presence.has_left(member.address) or store.check([f"gone/{member.id}"]):
                store.set(f"gone/{member.id}", "1")  # for all: leaders that differ in it would end each other's epochs
                self._lost.add(member.id)
        epoch = self._epoch
        if epoch is None:
            return
        ids = {member.id for member in epoch.members}
        for member in epoch.members:
            if member.id in self._lost and not store.check([f"end/{member.id}"]):
                store.set(f"broken/{epoch.number}", f"replica {member.replica} on {member.host} is lost")
        if epoch.members[0].id != self._id:
            self._waiting = set[str]()
            return  # who decides the next epoch looks who waits, so that no two differ in it
        waiting = [each for each in others if each.id not in {*ids, *self._lost}]
        self._waiting = {each.id for each in waiting if store.check([f"joins/{each.id}"])}


def _arrived(store: Any) -> list[Member]:
    """The replicas that have come, in that order. The counter is ahead of what is written for a moment."""
    keys = [f"arrival/{number}" for number in range(1, store.add("arrivals", 0) + 1)]
    return [Member(**parse_json(store.get(key))) for key in keys if store.check([key])]


def _connect(separate: SeparateReplica, timeout: timedelta) -> Any:
    """
    Raises:
        UserError: the host of the store has no address. RestartFault: the store does not answer.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    where = f"MEGADISTILL_STORE={printable(separate.store)}, the store of the replicas"
    require_address(separate.host, separate.port, deadline, where, "give HOST:PORT of the process that holds it")
    absent = "start python -m megadistill.distributed.store_server --port P there, or a firewall is in between"
    try:
        await_answer(separate.host, separate.port, deadline, where, absent)
        return TCPStore(separate.host, separate.port, None, False, timeout, False)
    except RestartFault:  # it is a RuntimeError, and says all
        raise
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RestartFault(f"{where}: no connection ({printable(reason)[:200]}): {absent}") from None
