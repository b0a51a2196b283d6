"""The watchdog of a launch: heartbeats of all ranks, and an abort with a reason for a run that hangs.

Every rank publishes its state (`diagnosis.Heartbeat`) about once a second. Those of a node go to the launch's store
over one connection, which its local rank 0 holds (`relay`). Rank 0 alone reads the heartbeats of all. It decides
(`diagnosis.HangDetector`) and publishes the decision; each rank then writes the stacks of its threads and exits with
the code of a fault that a restart can mend. A wait in a collective cannot be interrupted, so the process ends.

Two threads can act where others hang. The *publisher* exchanges messages with the store, which hangs where its host
does. The *clock* uses no network, and ends a rank whose publisher gets no replies: rank 0 or the host of the store
is frozen or gone. The clock also arms a timer of faulthandler's. While code in C holds the interpreter's lock neither
thread runs; the timer, which needs no lock, then writes the stacks, and ends a launched rank (exit 1, after its peers).
A frozen process (SIGSTOP) can only be killed, and its launcher does so when its peers have ended.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.distributed.flight_recorder import dump_flight_recorder, dump_prefix, is_recording
from megadistill.distributed.watchdog.diagnosis import (
    GRACE_SECONDS,
    LOST,
    HangDetector,
    Heartbeat,
    dead_rank_message,
    read_decision,
    silence_limit,
)
from megadistill.distributed.watchdog.parent import write_stderr
from megadistill.distributed.watchdog.relay import Relay, RelayClient, RelayLost
from megadistill.distributed.watchdog.stack_probe import blocked_in_collective
from megadistill.errors import RestartFault

HEARTBEAT_SECONDS = 1.0
RANKS_PER_PERIOD = 512
"""Heartbeats that rank 0 reads in a second; those of more ranks it reads less often."""
REPLY_SECONDS = 7.0
"""Time limit (s) for learning which rank was lost, and for writing the stacks: the disk may be what hangs."""
TIMER_SECONDS = 15.0
"""Time (s) from which this rank counts as dead until the timer of faulthandler's ends it."""

CONNECT_SECONDS = 5.0
"""Time limit (s) for the store to accept a connection in the middle of a run."""

_STATUS = "status"
"""Store key of rank 0's decision."""


class Watchdog:
    """Hang detection for one process, over all ranks of the launch. Without `start` its methods have no effect.

    `store`: the launch's; None in a world of one, whose own stalls are detected too. `silence`: age (s) of a heartbeat
    from which its rank counts as dead. `collective_limit`: time limit (s) of a collective, before which a phase must be
    found late: the backend ends the process then, and names no rank. `reports_rank_0`: whether this rank logs the death
    of rank 0. `relay`: this rank's end of the connection of its node; None: a connection of its own.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        silence: float = 60.0,
        collective_limit: float | None = None,
        reports_rank_0: bool = True,
        relay: Relay | RelayClient | None = None,
    ) -> None:
        self.on_abort: Callable[[str], bool | None] | None = None
        """Called with the reason, on the ranks that end the others and on those that have lost one, before the process
        exits. False: this rank does not print it, as another one of its node has."""
        self.collectives: Callable[[], dict[str, int]] = dict
        """Counts the collectives that this process has joined, by group (`stack_probe`)."""
        self.waits_for_replicas = False
        """Whether the main thread waits for other replicas, which have watchdogs of their own: no hang of this one."""
        self._waits = 0
        """Looks in a row that found it so."""
        self._waited_in: tuple[str, int] | None = None
        """Phase and step of the last such wait."""
        self._store: Any = store
        self._connection: Any = None
        """The watchdog's own connection to the store; None while the node's local rank 0 passes the messages on."""
        self._relay = relay
        self._rank, self._world, self._silence, self._reports_rank_0 = rank, world, silence, reports_rank_0
        self._period = HEARTBEAT_SECONDS * (1 + world // RANKS_PER_PERIOD)
        self._longest: float | None = None
        """Longest time limit (s) of a phase: two updates of the detector come before the backend's own limit."""
        if collective_limit is not None:
            self._longest = collective_limit - min(collective_limit / 10, 3 * self._period + 2.0)
        self._frozen = 0.0
        """Time (s) in which this process did not run at all, as its clock noticed."""
        self._phase: tuple[str, int, float | None, float] = ("start", 0, None, time.monotonic())
        """Name, step, time limit (s) and begin."""
        self._last_reply: float | None = None
        """Time of the store's last reply; None before the first: the rendezvous has a time limit of its own."""
        self._unreachable_since: float | None = None
        self._all_present = False
        self._end: str | None = None
        self._lost_rank: str | None = None
        self._abort: tuple[str, float] | None = None
        """Reason, and when to exit."""
        self._acknowledged, self._wake, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._exiting = threading.Lock()
        self._stacks: IO[str] | None = None
        self._dump_prefix: str | None = None
        self._faulthandler_before = False
        self._threads: list[threading.Thread] = []

    # Called by the main thread

    def start(self) -> "Watchdog":
        if self._store is not None and not isinstance(self._relay, RelayClient):
            self._connect()
        if isinstance(self._relay, Relay):
            self._relay.start(self._wake.set)
        self._threads = [
            threading.Thread(target=work, name=f"watchdog {name}", daemon=True)
            for name, work in (("publisher", self._publish_loop), ("clock", self._clock_loop))
        ]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stops both threads. Call it after the last barrier of all ranks: the others would report this one dead."""
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * HEARTBEAT_SECONDS)  # the publisher may hang in the store
        if self._threads:
            faulthandler.cancel_dump_traceback_later()
            if self._relay is not None:
                self._relay.close()
        self._threads = []
        if self._stacks is not None:
            faulthandler.disable()
            if self._faulthandler_before and sys.__stderr__ is not None:
                with suppress(OSError, ValueError):
                    faulthandler.enable(sys.__stderr__)
            self._stacks.close()
            with suppress(OSError):
                if os.path.getsize(self._stacks.name) == 0:
                    os.unlink(self._stacks.name)
            self._stacks = None

    def enter_phase(self, phase: str, step: int, *, limit: float | None) -> None:
        """The main thread begins `phase`, which may take `limit` seconds (None: any time). Costs nothing.

        `step` is the current optimizer step, 0 outside of one.
        """
        if limit is not None and self._longest is not None:
            limit = min(limit, self._longest)
        self._phase = (phase, step, limit, self._now())

    def open_stack_file(self, folder: Path, attempt: int, *, rank: int | None = None) -> None:
        """Sends stacks to `folder`/stacks/attempt-00003-rank-00001.txt (rank of the launch); before, to stderr.

        `rank`: of all replicas, where each is a launch.

        The file is opened now, since the disk may hang later; `stop` removes an empty one. The stacks of a process that
        aborts go there too, and the last collectives to attempt-00003-student-collectives-1 (rank of the student).
        """
        path = folder / "stacks" / f"attempt-{attempt:05d}-rank-{self._rank if rank is None else rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        former, self._stacks = self._stacks, path.open("w", encoding="utf-8")
        self._faulthandler_before = self._faulthandler_before or faulthandler.is_enabled()
        faulthandler.enable(self._stacks)
        self.write_collectives_to(path.with_name(f"attempt-{attempt:05d}-student-collectives-"))
        if self._threads:
            self._arm_faulthandler()
        if former is not None:
            former.close()

    def write_collectives_to(self, prefix: Path) -> None:
        """The last collectives are written to `prefix`N in a hang, and where NCCL's own watchdog ends the process."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._dump_prefix = dump_prefix(prefix)

    def report_failure(self, reason: str) -> None:
        """Publishes why this rank ends, and stops the watchdog."""
        if self._threads and self._store is not None:
            self._acknowledged.clear()
            self._end = reason
            self._wake.set()
            self._acknowledged.wait(REPLY_SECONDS)
            if self._rank == 0 or isinstance(self._relay, Relay):
                time.sleep(1.5 * HEARTBEAT_SECONDS)  # the others read the reason from this process
        self.stop()

    def lost_rank(self) -> str | None:
        """The rank behind a broken connection, and its error, if rank 0 finds out in seconds. Stops the watchdog."""
        if self._lost_rank is None:
            self.report_failure(LOST)
        else:  # rank 0 has named it, and the store may be gone with it
            self._end = LOST
            self.stop()
        return self._lost_rank

    def _now(self) -> float:
        """A clock (s) that stands still while the process is frozen."""
        return time.monotonic() - self._frozen

    def heartbeat(self, tick: int) -> Heartbeat:
        """The current state of this rank."""
        phase, step, limit, since = self._phase
        main = threading.main_thread().ident
        assert main is not None
        is_waiting, location = blocked_in_collective(sys._current_frames(), main)
        return Heartbeat(
            host=socket.gethostname(),
            pid=os.getpid(),
            tick=tick,
            phase=phase,
            step=step,
            seconds=self._now() - since,
            limit=limit,
            is_waiting=is_waiting,
            location=location,
            collectives=self.collectives(),
            end=self._end,
        )

    # The publisher

    def _publish_loop(self) -> None:
        detector = HangDetector(silence=self._silence, period=self._period)
        tick = 0
        while not self._stopped.is_set():
            tick += 1
            try:
                if self._rank == 0:
                    self._decide(detector, tick)
                else:
                    self._poll(tick)
            except RuntimeError as error:  # the store is gone, and its host with it
                if isinstance(self._relay, Relay):
                    self._relay.store_failed(str(error))
                self._store_unreachable(error)
            if self._abort is not None and time.monotonic() >= self._abort[1]:
                self._exit(self._abort[0], report=self._rank == 0)
            self._wake.wait(self._period if self._rank == 0 else HEARTBEAT_SECONDS)
            self._wake.clear()

    def _decide(self, detector: HangDetector, tick: int) -> None:
        """Rank 0: reads all heartbeats and publishes whether to abort."""
        now = time.monotonic()
        own = self.heartbeat(tick)
        self._waits = self._waits + 1 if self.waits_for_replicas else 0
        if self._waits > 1:
            self._waited_in = own.phase, own.step
        hangs = self._waited_in != (own.phase, own.step)
        abort, grace = detector.update({0: own, **self._read_heartbeats()}, now, hangs=hangs), 0.0
        lost_rank = detector.lost_rank(now)
        if own.end is not None:
            self._lost_rank = lost_rank
            if abort is None:
                reason = lost_rank or "rank 0 lost another rank"
                abort, grace = f"{reason}; the other ranks cannot continue without it", GRACE_SECONDS
        if self._connection is not None:
            status = {"tick": tick, "abort": abort, "grace": grace, "lost_rank": lost_rank}
            self._connection.set(_STATUS, json.dumps(status))
            self._replied(json.dumps(status))
        self._last_reply = time.monotonic()
        if own.end is not None and lost_rank is not None:
            self._acknowledged.set()
        elif abort is not None and own.end is None:
            self._abort = (abort, now)

    def _read_heartbeats(self) -> dict[int, Heartbeat]:
        """The heartbeats of all ranks but rank 0; none before the last of them has published its first one."""
        if self._connection is None:
            return {}
        self._pass_on({})
        keys = [str(rank) for rank in range(1, self._world)]
        self._all_present = self._all_present or self._connection.check(keys)
        if not self._all_present:
            return {}
        texts = zip(keys, self._connection.multi_get(keys), strict=True)
        return {int(key): heartbeat for key, text in texts if (heartbeat := Heartbeat.loads(text)) is not None}

    def _poll(self, tick: int) -> None:
        """Other ranks: publish the heartbeat, and read rank 0's decision."""
        own = self.heartbeat(tick)
        text = self._exchange(own)
        status = None if text is None else read_decision(text)
        if status is None:
            return
        self._lost_rank = status["lost_rank"]
        if own.end is not None:
            if own.end != LOST or self._lost_rank is not None:
                self._acknowledged.set()
        elif status["abort"] is not None and self._abort is None:
            self._abort = (status["abort"], time.monotonic() + status["grace"])

    def _exchange(self, own: Heartbeat) -> str | bytes | None:
        """Sends this rank's heartbeat, and returns rank 0's last decision; None: there is none yet.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        if self._connection is None and isinstance(self._relay, RelayClient):
            try:
                reply = self._relay.exchange(own.dumps(), waits=own.end is None)
            except RelayLost:
                if self._stopped.is_set():  # the local rank 0 has stopped too
                    return None
                _require_listening(self._store)
                self._connect()
            else:
                if reply is None or reply["decision"] is None:
                    return None
                self._last_reply = time.monotonic() - reply["age"]
                if reply["error"] is not None:
                    raise RuntimeError(reply["error"])
                return reply["decision"]
        self._pass_on({self._rank: own.dumps()})
        decision: bytes = self._connection.get(_STATUS)
        self._last_reply = time.monotonic()
        self._replied(decision.decode("utf-8", "replace"))
        return decision

    def _connect(self) -> None:
        """A connection of the watchdog's own: the run's may wait."""
        self._connection = PrefixStore("watchdog", self._store.clone())

    def _pass_on(self, heartbeats: dict[int, str]) -> None:
        """Publishes `heartbeats` and those of this node's other ranks, in one message."""
        if isinstance(self._relay, Relay):
            heartbeats = {**self._relay.take(), **heartbeats}
        if heartbeats:
            self._connection.multi_set(list(map(str, heartbeats)), list(heartbeats.values()))

    def _replied(self, decision: str) -> None:
        if isinstance(self._relay, Relay):
            self._relay.store_replied(decision)

    def _store_unreachable(self, error: RuntimeError) -> None:
        now = time.monotonic()
        self._lost_rank = self._lost_rank or "rank 0, or the launcher that holds the store: its connection is closed"
        self._acknowledged.set()
        if self._unreachable_since is None:
            self._unreachable_since = now
        if self._abort is None and self._end is None and now - self._unreachable_since > GRACE_SECONDS:
            reason = str(error).splitlines()[0]
            self._exit(f"rank {self._rank}: lost {self._lost_rank} ({reason})", report=self._reports_rank_0)

    # The clock

    def _clock_loop(self) -> None:
        last = time.monotonic()
        while not self._stopped.is_set():
            now = time.monotonic()
            if now - last > 5 * HEARTBEAT_SECONDS:
                self._frozen += now - last
                self._last_reply = None if self._last_reply is None else now
            last = now
            silence = silence_limit(self._silence, self._phase[2])
            if self._last_reply is not None and now - self._last_reply > silence and self._end is None:
                self._exit(dead_rank_message(0, None, now - self._last_reply), report=self._reports_rank_0)
            self._arm_faulthandler()
            self._stopped.wait(HEARTBEAT_SECONDS)

    def _arm_faulthandler(self) -> None:
        """Takes about 100 us: too long for `enter_phase`, so the clock, which never blocks, does it each second."""
        seconds, exits = self._silence + TIMER_SECONDS, self._world > 1
        faulthandler.dump_traceback_later(seconds, exit=exits, file=self._stacks_descriptor())

    # The abort

    def _exit(self, reason: str, *, report: bool) -> None:
        """Writes the stacks and ends this process, as its peers end theirs."""
        if not self._exiting.acquire(blocking=False) or self._stopped.is_set():
            return
        if report:
            write_stderr(f"{reason}; {self._evidence()}")
        dump = threading.Thread(target=self._dump_stacks, args=(reason, report), daemon=True)
        dump.start()
        dump.join(REPLY_SECONDS)
        # A launcher ends all ranks when the first one exits: by now the others have read the decision too.
        time.sleep(2 * HEARTBEAT_SECONDS)
        os._exit(RestartFault.exit_code)

    def _dump_stacks(self, reason: str, report: bool) -> None:
        phase, step, _, _ = self._phase
        descriptor = self._stacks_descriptor()
        header = f"rank {self._rank} on {socket.gethostname()}, {phase} of step {step}: {reason}\n"
        with suppress(OSError):
            os.write(descriptor, header.encode())
            faulthandler.dump_traceback(descriptor)
        if report and self.on_abort is not None:
            self.on_abort(reason)
        if self._dump_prefix is not None:  # last: it takes locks of torch's, which a hang may hold
            dump_flight_recorder(self._dump_prefix)

    def _evidence(self) -> str:
        """The places of the stacks of all ranks, and of their last collectives."""
        if self._stacks is None:
            return "stacks are in the lines below"
        where = f"stacks are in {os.path.dirname(self._stacks.name)}"
        if self._dump_prefix is None or not is_recording():
            return where
        return f"{where}, the last collectives in {self._dump_prefix}*"

    def _stacks_descriptor(self) -> int:
        return 2 if self._stacks is None else self._stacks.fileno()


def _require_listening(store: Any) -> None:
    """Raises RuntimeError where nothing accepts connections to the store: torch would try for its whole time limit."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return
    try:
        socket.create_connection((store.host, store.port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RuntimeError(f"the launch's store does not answer: {error}") from None
