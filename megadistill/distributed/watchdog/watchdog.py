"""The watchdog of a launch: heartbeats of all ranks, and an abort with a reason for a run that hangs.

Every rank publishes its state (`diagnosis.Heartbeat`) about once a second, over a connection of its own to the launch's
store. Rank 0 alone reads the heartbeats of all, so the store carries a few messages a rank and second. It decides
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

from torch.distributed.distributed_c10d import PrefixStore, Store

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
from megadistill.distributed.watchdog.stack_probe import blocked_in_collective
from megadistill.errors import RestartFault

HEARTBEAT_SECONDS = 1.0
RANKS_PER_PERIOD = 512
"""Heartbeats that rank 0 reads in a second; those of more ranks it reads less often."""
REPLY_SECONDS = 5.0
"""Time limit (s) for learning which rank was lost, and for writing the stacks: the disk may be what hangs."""
TIMER_SECONDS = 15.0
"""Time (s) from which this rank counts as dead until the timer of faulthandler's ends it."""

_STATUS = "status"
"""Store key of rank 0's decision."""


class Watchdog:
    """Hang detection for one process, over all ranks of the launch. Without `start` its methods have no effect.

    `store`: the launch's; None in a world of one, whose own stalls are detected too. `silence`: age (s) of a heartbeat
    from which its rank counts as dead. `reports_rank_0`: whether this rank logs the death of rank 0.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        silence: float = 60.0,
        reports_rank_0: bool = True,
    ) -> None:
        self.on_abort: Callable[[str], None] | None = None
        """Called with the reason, on the ranks that log it, before the process exits."""
        self.collectives: Callable[[], dict[str, int]] = dict
        """Counts the collectives that this process has joined, by group (`stack_probe`)."""
        self._store: Any = store
        self._rank, self._world, self._silence, self._reports_rank_0 = rank, world, silence, reports_rank_0
        self._period = HEARTBEAT_SECONDS * (1 + world // RANKS_PER_PERIOD)
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
        self._threads: list[threading.Thread] = []

    # Called by the main thread

    def start(self) -> "Watchdog":
        if self._store is not None:
            self._store = PrefixStore("watchdog", self._store.clone())  # its own connection: the run's may wait
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
        self._threads = []
        if self._stacks is not None:
            self._stacks.close()
            with suppress(OSError):
                if os.path.getsize(self._stacks.name) == 0:
                    os.unlink(self._stacks.name)
            self._stacks = None

    def enter_phase(self, phase: str, step: int, *, limit: float | None) -> None:
        """The main thread begins `phase`, which may take `limit` seconds (None: any time). Costs nothing.

        `step` is the current optimizer step, 0 outside of one.
        """
        self._phase = (phase, step, limit, self._now())

    def open_stack_file(self, folder: Path, attempt: int) -> None:
        """Sends stacks to `folder`/stacks/attempt-00003-rank-00001.txt (rank of the launch); before, to stderr.

        The file is opened now, since the disk may hang later; `stop` removes an empty one.
        """
        path = folder / "stacks" / f"attempt-{attempt:05d}-rank-{self._rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("w", encoding="utf-8")
        if self._threads:
            self._arm_faulthandler()

    def report_failure(self, reason: str) -> None:
        """Publishes why this rank ends, and stops the watchdog."""
        if self._threads and self._store is not None:
            self._acknowledged.clear()
            self._end = reason
            self._wake.set()
            self._acknowledged.wait(REPLY_SECONDS)
            if self._rank == 0:
                time.sleep(1.5 * HEARTBEAT_SECONDS)  # the store may be in this process: let the others read it
        self.stop()

    def lost_rank(self) -> str | None:
        """The rank behind a broken connection, and its error, if rank 0 finds out in seconds. Stops the watchdog."""
        self.report_failure(LOST)
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
                self._last_reply = time.monotonic()
            except RuntimeError as error:  # the store is gone, and its host with it
                self._store_unreachable(error)
            if self._abort is not None and time.monotonic() >= self._abort[1]:
                self._exit(self._abort[0], report=self._rank == 0)
            self._wake.wait(self._period if self._rank == 0 else HEARTBEAT_SECONDS)
            self._wake.clear()

    def _decide(self, detector: HangDetector, tick: int) -> None:
        """Rank 0: reads all heartbeats and publishes whether to abort."""
        now = time.monotonic()
        own = self.heartbeat(tick)
        abort, grace = detector.update({0: own, **self._read_heartbeats()}, now), 0.0
        lost_rank = detector.lost_rank(now)
        if own.end is not None:
            self._lost_rank = lost_rank
            if abort is None:
                reason = lost_rank or "rank 0 lost another rank"
                abort, grace = f"{reason}; the other ranks cannot continue without it", GRACE_SECONDS
        if self._store is not None:
            status = {"tick": tick, "abort": abort, "grace": grace, "lost_rank": lost_rank}
            self._store.set(_STATUS, json.dumps(status))
        if own.end is not None and lost_rank is not None:
            self._acknowledged.set()
        elif abort is not None and own.end is None:
            self._abort = (abort, now)

    def _read_heartbeats(self) -> dict[int, Heartbeat]:
        """The heartbeats of all ranks but rank 0; none before the last of them has published its first one."""
        if self._store is None:
            return {}
        keys = [str(rank) for rank in range(1, self._world)]
        self._all_present = self._all_present or self._store.check(keys)
        if not self._all_present:
            return {}
        texts = zip(keys, self._store.multi_get(keys), strict=True)
        return {int(key): heartbeat for key, text in texts if (heartbeat := Heartbeat.loads(text)) is not None}

    def _poll(self, tick: int) -> None:
        """Other ranks: publish the heartbeat, and read rank 0's decision."""
        own = self.heartbeat(tick)
        self._store.set(str(self._rank), own.dumps())
        status = read_decision(self._store.get(_STATUS))
        if status is None:
            return
        self._lost_rank = status["lost_rank"]
        if own.end is not None:
            if own.end != LOST or self._lost_rank is not None:
                self._acknowledged.set()
        elif status["abort"] is not None and self._abort is None:
            self._abort = (status["abort"], time.monotonic() + status["grace"])

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
            where = "the lines below" if self._stacks is None else os.path.dirname(self._stacks.name)
            write_stderr(f"{reason}; stacks are in {where}")
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

    def _stacks_descriptor(self) -> int:
        return 2 if self._stacks is None else self._stacks.fileno()
